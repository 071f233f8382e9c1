"""An evaluation from folders and a named text: read the models, cut the windows, score them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.corpora import TextSource, load_documents, source_warnings
from optgptq.data.evaluation import EvaluationWindows, evaluation_windows
from optgptq.data.tokenizer import Tokenizer, load_tokenizer
from optgptq.data.windows import resolve_window_size
from optgptq.errors import InputError, UsageError
from optgptq.evaluation.decoding import PLAIN_CACHE, CacheFacts, CacheOptions, DecodingModel
from optgptq.evaluation.perplexity import EvalResult, LanguageModel, evaluate
from optgptq.models.decoder import Decoder
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.cache_plan import cache_of_folder
from optgptq.runtime.engine_settings import CACHE_OF_CHECKPOINT
from optgptq.runtime.load import load_model

# Everything that a tokenizer is made from, in the spellings that model folders use.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Enough text to show any difference between two tokenizers that a user could have confused.
_COMPARED_CHARACTERS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """What to score models on.

    Attributes:
        source: the text.
        window_size: tokens per window; None for 2048, or the model's positions where it has fewer.
        stride: tokens between window starts; None for windows that do not overlap.
        max_tokens: tokens of the text that are used; None for all.
        decoding: score the candidate as it writes text, through pages with this cache; None: in full forwards, which
            read no quantized cache.
        against_plain_cache: the baseline is the candidate itself without a quantized cache; needs `decoding`.
    """

    source: TextSource
    window_size: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    decoding: CacheOptions | None = None
    against_plain_cache: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """What came of it.

    Attributes:
        result: the figures.
        window_size: tokens per window.
        num_windows: windows scored.
        remainder_tokens: tokens at the end of the text that fill no window.
        tokens_sha256: of the windows' tokens; equal numbers mean the same text and tokenizer.
        notes: what was done with the text.
        warnings: everything that a user must hear about.
        cache: what the candidate was scored with; None in full forwards.
    """

    result: EvalResult
    window_size: int
    num_windows: int
    remainder_tokens: int
    tokens_sha256: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    cache: CacheFacts | None = None


def evaluate_folders(
    candidate: Path,
    settings: EvaluationSettings,
    *,
    baseline: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationReport:
    """Score the model in folder `candidate`, and compare it with the one in `baseline` where that is given.

    No BOS is added, whatever the model's habit. Both models run in float32 with decoded weights.

    Raises:
        ModelError, FormatError: a model that cannot be read.
        TextError: a text that cannot be read, or is shorter than a window.
        UsageError: numbers that cannot be obeyed.
        InputError: tokenizer and model, or the two models, do not belong together.
        NumericalError: a model gives logits that are not finite.
    """
    _require_one_baseline(settings, baseline)
    tokenizer = load_tokenizer(candidate)
    decoder = load_model(candidate, device=device)
    spec = decoder.spec
    windows = evaluation_windows(
        load_documents(settings.source, render_chat=tokenizer.render_chat),
        tokenizer,
        window_size=resolve_window_size(settings.window_size, spec.max_position),
        max_tokens=settings.max_tokens,
        stride=settings.stride,
    )
    _require_known_tokens(windows, spec)
    if baseline is not None:
        _require_same_tokenizer(tokenizer, baseline, windows)
    models = _models(candidate, decoder, settings, window_size=windows.tokens_WS.shape[1])
    told: list[str] = []
    result = evaluate(
        models.candidate,
        windows.tokens_WS,
        baseline=models.itself if baseline is None else load_model(baseline, device=device),
        first_scored_W=windows.first_scored_W,
        progress=progress,
        warn=told.append,
    )
    return EvaluationReport(
        result=result,
        window_size=windows.tokens_WS.shape[1],
        num_windows=windows.tokens_WS.shape[0],
        remainder_tokens=windows.remainder_tokens,
        tokens_sha256=windows.sha256,
        notes=windows.notes,
        warnings=source_warnings(settings.source) + _position_warnings(windows, spec) + models.warnings + tuple(told),
        cache=models.cache,
    )


def _require_one_baseline(settings: EvaluationSettings, baseline: Path | None) -> None:
    if settings.against_plain_cache and (settings.decoding is None or baseline is not None):
        raise UsageError(
            "--baseline-cache",
            expected="--decode, and no --baseline",
            found="no --decode" if settings.decoding is None else f"the baseline {baseline}",
            action="Compare either with another model, or with the same one without a quantized cache.",
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Models:
    """What is scored: the candidate, and itself with a plain cache where that is the baseline."""

    candidate: LanguageModel
    itself: LanguageModel | None = None
    cache: CacheFacts | None = None
    warnings: tuple[str, ...] = ()


def _models(folder: Path, decoder: Decoder, settings: EvaluationSettings, *, window_size: int) -> _Models:
    if settings.decoding is None:
        return _Models(candidate=decoder)
    is_read = settings.decoding.kv_cache == CACHE_OF_CHECKPOINT
    setup = cache_of_folder(CheckpointFolder.open(folder), decoder.spec) if is_read else None
    through_pages = DecodingModel.start(decoder, setup, settings.decoding, window_size=window_size)
    return _Models(
        candidate=through_pages,
        itself=through_pages.runner.decoder if settings.against_plain_cache else None,
        cache=through_pages.cache,
        warnings=_cache_warnings(through_pages.cache, window_size),
    )


def _cache_warnings(cache: CacheFacts, window_size: int) -> tuple[str, ...]:
    if cache.num_exact < window_size // 2 or cache.mode == PLAIN_CACHE:
        return ()
    return (
        f"The windows have {window_size} tokens, of which each token reads up to {cache.num_exact} in full precision: "
        "longer windows say more of the codes.",
    )


def _require_known_tokens(windows: EvaluationWindows, spec: DecoderSpec) -> None:
    largest = int(windows.tokens_WS.max())
    if largest >= spec.vocab_size:
        raise InputError(
            "tokenizer of the model",
            expected=f"token ids below the model's vocabulary size {spec.vocab_size}",
            found=str(largest),
            action="Copy the tokenizer that belongs to the model into its folder.",
        )


def _require_same_tokenizer(tokenizer: Tokenizer, baseline: Path, windows: EvaluationWindows) -> None:
    """Check that the baseline reads text as the candidate does: on the text itself, where their files differ."""
    if _same_files(tokenizer.folder, baseline):
        return
    text = tokenizer.decode(windows.tokens_WS.flatten().tolist())[:_COMPARED_CHARACTERS]
    if load_tokenizer(baseline).encode(text) != tokenizer.encode(text):
        raise InputError(
            f"tokenizer of the baseline {baseline}",
            expected="the same token ids for the text as the candidate's tokenizer",
            found="others",
            action="Compare a checkpoint with the model that it was made from.",
        )


def _same_files(first: Path, second: Path) -> bool:
    for name in _TOKENIZER_FILES:
        contents = [(folder / name).read_bytes() if (folder / name).is_file() else None for folder in (first, second)]
        if contents[0] != contents[1]:
            return False
    return True


def _position_warnings(windows: EvaluationWindows, spec: DecoderSpec) -> tuple[str, ...]:
    window_size = windows.tokens_WS.shape[1]
    if spec.max_position is None or window_size <= spec.max_position:
        return ()
    return (
        f"The windows have {window_size} tokens, but the model promises only {spec.max_position} positions: "
        "its figures get worse beyond them.",
    )
