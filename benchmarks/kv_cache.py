"""A quantized KV cache as decoding reads it: perplexity and mean KL against the same weights with a 16-bit cache.

Whole windows are scored with every query's past taken from codes (mode `token`), on text that is not calibration text:
with the first and last tokens exact that recipes keep, and with none but the query's own. `plain` rounds to the nearest
in the range of the numbers, `Hadamard` does so behind a Hadamard matrix, without calibration; the other rows are the
calibration, whole and changed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measure.cases import EVALUATION_TOKENS, REPOSITORY, Case, chosen_cases
from measure.report import Report, finish, median_and_spread, new_parser

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.corpora import TextSource, load_documents
from optgptq.data.evaluation import evaluation_windows
from optgptq.data.tokenizer import load_tokenizer
from optgptq.data.windows import Windows, WindowSettings, build_windows
from optgptq.evaluation.perplexity import EvalResult, evaluate
from optgptq.journal.store import NothingKept
from optgptq.kv_cache.hadamard import block_hadamard
from optgptq.kv_cache.page_layout import PAGE_MULTIPLE, PageLayout, bits_per_value
from optgptq.kv_cache.scheme import (
    USUAL_RECENT_TOKENS,
    USUAL_SINK_TOKENS,
    CacheScheme,
    LayerScheme,
    PastRule,
    SideScheme,
)
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.kv_calibration.attend import CacheAttend, LayerQuantizer
from optgptq.kv_calibration.calibrate import CalibratedCache, StreamedModel, calibrate_cache
from optgptq.kv_calibration.settings import CacheCalibrationSettings
from optgptq.models.attention import attention_context
from optgptq.models.decoder import Decoder
from optgptq.models.ends import Head
from optgptq.runtime.load import load_model

CPU = torch.device("cpu")
PLAIN, ROTATED, CALIBRATED = "plain", "Hadamard", "calibrated (as shipped)"
NEAREST, ALLOCATED, REFINED = "- fitted codes", "+ bits allocated", "+ gradients"
BITS = (4, 3, 2)
# Largest growth of perplexity that the project promises, by bits.
LIMITS = {4: 0.01, 3: 0.03, 2: 0.08}
KL_SHARE = 0.5
NUM_WINDOWS = 16
COLUMNS = (
    "model",
    "bits",
    "bits per value",
    "bytes per token",
    "exact tokens",
    "method",
    "perplexity",
    "growth",
    "mean KL",
    "of plain",
)


@dataclass(frozen=True, slots=True, eq=False)
class CachedModel:
    """A `LanguageModel` whose past is read from codes."""

    decoder: Decoder
    attend: CacheAttend

    @property
    def head(self) -> Head:
        return self.decoder.head

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def hidden(self, tokens_BS: torch.Tensor, /) -> torch.Tensor:
        context = attention_context(self.decoder.spec, tokens_BS.shape[1], attend=self.attend)
        return self.decoder.hidden(tokens_BS, context)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trial:
    """One model with its texts: calibration windows by seed."""

    case: Case
    decoder: Decoder
    calibration: tuple[Windows, ...]
    tokens_WS: torch.Tensor


def main() -> int:
    """Measure the chosen models."""
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", help="default: all that are present")
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS), choices=BITS)
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration windows")
    parser.add_argument("--parts", action="store_true", help="also with changed parts, and with gradients")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="folder with other models")
    arguments = parser.parse_args()
    report = Report(name="kv-cache", title="Quantized KV cache, quality", columns=COLUMNS)
    for case in chosen_cases(arguments, parser, report.notes):
        trial = _trial(case, arguments)
        for bits in arguments.bits:
            usual = PastRule(mode="token", sink_tokens=USUAL_SINK_TOKENS[bits], recent_tokens=USUAL_RECENT_TOKENS[bits])
            _measure(report, trial, bits, usual, parts=arguments.parts)
            _measure(report, trial, bits, PastRule(mode="token"), parts=False)
    report.notes += [
        f"{8 if arguments.quick else NUM_WINDOWS} calibration windows. As shipped they were drawn several "
        "times: median (smallest to largest); other rows have the first draw.",
        "Bytes per token count parameters and padding: in heads of 16, codes of 3 bits are filled up to those of 4.",
    ]
    return finish(report, arguments)


def _trial(case: Case, arguments: argparse.Namespace) -> Trial:
    tokenizer = load_tokenizer(case.model)

    def documents(source: str) -> list[str]:
        return list(load_documents(TextSource(source=source), render_chat=tokenizer.render_chat))

    texts = documents(case.calibration)
    size, number = case.window_size, 8 if arguments.quick else NUM_WINDOWS
    calibration = tuple(
        build_windows(texts, tokenizer, WindowSettings(window_size=size, num_windows=number, seed=seed))
        for seed in range(1 if arguments.quick else arguments.seeds)
    )
    max_tokens = 4 * size if arguments.quick else EVALUATION_TOKENS
    read = evaluation_windows(documents(case.evaluation), tokenizer, window_size=size, max_tokens=max_tokens)
    return Trial(case=case, decoder=load_model(case.model), calibration=calibration, tokens_WS=read.tokens_WS)


def _measure(report: Report, trial: Trial, bits: int, past: PastRule, *, parts: bool) -> None:
    spec, is_usual = trial.decoder.spec, past.recent_tokens > 0
    side = SideScheme(bits=bits, group_size=spec.head_dim)
    scheme = CacheScheme(layers=(LayerScheme(keys=side, values=side),) * spec.num_layers, past=past)
    asked = CacheCalibrationSettings(schemes=scheme.layers, past=past)
    methods = {CALIBRATED: asked}
    if parts:
        methods[NEAREST] = replace(asked, rounding="nearest")
        methods[ALLOCATED] = replace(asked, budget_bits=float(bits))
        methods[REFINED] = replace(asked, refine="gradient")
    rotation_KDD = block_hadamard(spec.head_dim).expand(spec.num_kv_heads, -1, -1)
    found = {PLAIN: [(scheme, _everywhere(spec.num_layers, SideParameters()))]}
    found[ROTATED] = [(scheme, _everywhere(spec.num_layers, SideParameters(rotation_KDD=rotation_KDD)))]
    for name, settings in methods.items():
        draws = trial.calibration if name == CALIBRATED and is_usual else trial.calibration[:1]
        calibrated = [_calibrated(trial, settings, windows) for windows in draws]
        found[name] = [(cache.scheme, cache.layers) for cache in calibrated]
    divergence: dict[str, float] = {}
    growth: dict[str, float] = {}
    for name, caches in found.items():
        results = [_score(trial, *cache) for cache in caches]
        divergence[name] = statistics.median(_known(result.mean_kl) for result in results)
        growth[name] = statistics.median(_growth(result) for result in results)
        exact = f"first {past.sink_tokens}, last {past.recent_tokens}" if is_usual else "own"
        row = [trial.case.name, str(bits), *_sizes(trial.decoder, caches[0][0]), exact, name]
        row += [median_and_spread([result.perplexity for result in results], 3)]
        row += [median_and_spread([100 * _growth(result) for result in results], 2) + " %"]
        row += [median_and_spread([_known(result.mean_kl) for result in results], 5)]
        row += [f"{divergence[name] / divergence[PLAIN]:.2f}"]
        report.rows.append(row)
        report.details.append(dict(zip(COLUMNS, row, strict=True)))
        print(" | ".join(row), file=sys.stderr, flush=True)
    _judge(report, f"{trial.case.name}, {bits} bits, exact: {exact}", bits, growth, divergence, is_usual=is_usual)


def _judge(
    report: Report,
    where: str,
    bits: int,
    growth: dict[str, float],
    divergence: dict[str, float],
    *,
    is_usual: bool,
) -> None:
    if is_usual and growth[CALIBRATED] > LIMITS[bits]:
        report.missed.append(f"{where}: perplexity grows by {growth[CALIBRATED]:.2%}, more than {LIMITS[bits]:.0%}.")
    if bits == 4 and divergence[CALIBRATED] > KL_SHARE * divergence[PLAIN]:
        report.missed.append(f"{where}: the mean KL is more than half of that of plain rounding.")
    if divergence[CALIBRATED] > min(divergence[PLAIN], divergence[ROTATED]):
        report.missed.append(f"{where}: calibration does worse than none.")


def _everywhere(num_layers: int, side: SideParameters) -> tuple[LayerParameters, ...]:
    return (LayerParameters(keys=side, values=side),) * num_layers


def _calibrated(trial: Trial, settings: CacheCalibrationSettings, windows: Windows) -> CalibratedCache:
    decoder = trial.decoder
    model = StreamedModel(
        source=CheckpointFolder.open(trial.case.model),
        spec=decoder.spec,
        layer_of=decoder.layers.__getitem__,
        dtype=decoder.dtype,
        device=CPU,
    )
    return calibrate_cache(model, settings, windows, steps=NothingKept(), layer_started=lambda index: None)


def _score(trial: Trial, scheme: CacheScheme, layers: tuple[LayerParameters, ...]) -> EvalResult:
    quantizers = {
        index: LayerQuantizer.of(own, parameters, CPU)
        for index, (own, parameters) in enumerate(zip(scheme.layers, layers, strict=True))
    }
    model = CachedModel(trial.decoder, CacheAttend(layers=quantizers, past=scheme.past))
    return evaluate(model, trial.tokens_WS, baseline=trial.decoder)


def _sizes(decoder: Decoder, scheme: CacheScheme) -> tuple[str, str]:
    """Return bits per value and bytes per token over all layers."""
    sides = [side for layer in scheme.layers for side in (layer.keys, layer.values)]
    num_bytes = sum(
        PageLayout(
            num_kv_heads=decoder.spec.num_kv_heads,
            head_dim=decoder.spec.head_dim,
            page_size=PAGE_MULTIPLE,
            scheme=layer,
            exact_bytes=2,
        ).bytes_per_token
        for layer in scheme.layers
    )
    return f"{statistics.mean(bits_per_value(side, decoder.spec.head_dim) for side in sides):.2f}", f"{num_bytes:,.0f}"


def _growth(result: EvalResult) -> float:
    return result.perplexity / _known(result.baseline_perplexity) - 1


def _known(number: float | None) -> float:
    assert number is not None
    return number


if __name__ == "__main__":
    sys.exit(main())
