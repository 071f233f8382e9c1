"""One evaluator for the output of every tool: what `optgptq eval` runs, on folders that our own reader decodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from measure.cases import EVALUATION_TOKENS
from measure.process import BenchmarkError
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.corpora import TextSource
from optgptq.evaluation.run import EvaluationSettings, evaluate_folders
from optgptq.formats import detect


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Figures of one checkpoint.

    Attributes:
        mean_kl: nats per token from the dense model.
        perplexity, dense_perplexity, top1_agreement: on the same tokens.
        bits_per_weight: see `stored_bits_per_weight`.
        num_quantized_weights: to see that two tools quantized the same linears.
    """

    mean_kl: float
    perplexity: float
    dense_perplexity: float
    top1_agreement: float
    bits_per_weight: float
    num_quantized_weights: int


def score(output: Path, model: Path, *, text: str, window_size: int, max_tokens: int = EVALUATION_TOKENS) -> Score:
    """Return the figures of the checkpoint in `output` beside the dense `model`."""
    settings = EvaluationSettings(source=TextSource(source=text), window_size=window_size, max_tokens=max_tokens)
    result = evaluate_folders(output, settings, baseline=model).result
    if result.mean_kl is None or result.baseline_perplexity is None or result.top1_agreement is None:
        raise BenchmarkError(f"{output}: the evaluation has no figures beside the dense model")
    if not math.isfinite(result.mean_kl):
        raise BenchmarkError(f"{output}: the divergence from the dense model is {result.mean_kl}")
    bits_per_weight, num_weights = stored_bits_per_weight(output)
    return Score(
        mean_kl=result.mean_kl,
        perplexity=result.perplexity,
        dense_perplexity=result.baseline_perplexity,
        top1_agreement=result.top1_agreement,
        bits_per_weight=bits_per_weight,
        num_quantized_weights=num_weights,
    )


def stored_bits_per_weight(output: Path) -> tuple[float, int]:
    """Return bits per quantized weight and the number of such weights, counted alike for every format.

    Codes, scales as they are stored, and zero points of asymmetric grids at the width of a code. The constants that
    some formats write for symmetric grids are not counted, nor is the padding of words.
    """
    folder = CheckpointFolder.open(output)
    form = detect(folder)
    if form is None:
        raise BenchmarkError(f"{output} is not quantized")
    num_bits = num_weights = 0
    for layout in form.read_layouts(folder):
        if layout.bits is None:
            continue
        weight = form.decode(folder, layout)
        num_bits += weight.stored_bits(zero_points_stored=not layout.symmetric)
        num_weights += weight.out_features * weight.in_features
    return num_bits / num_weights, num_weights
