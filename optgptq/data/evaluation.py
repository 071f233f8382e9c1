"""Consecutive windows for evaluation: in order, nothing added, every scored token scored once.

Shapes: `W` windows, `S` positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from optgptq.data.reading import read_tokens, tokens_sha256
from optgptq.data.tokenizer import Tokenizer
from optgptq.errors import TextError, UsageError


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class EvaluationWindows:
    """Windows to score a model on.

    Attributes:
        tokens_WS: int64 `[W, S]`, all full.
        first_scored_W: int64 `[W]`, the first position whose token is scored: 1 in the first window, since nothing
            predicts its first token; further on where windows overlap, since earlier windows scored what comes before.
        num_tokens_available: tokens of the text that windows were cut from.
        remainder_tokens: tokens at the end that fill no window.
        sha256: of `tokens_WS` as little-endian int64.
        notes: what was done with the text, in plain sentences.
    """

    tokens_WS: torch.Tensor
    first_scored_W: torch.Tensor
    num_tokens_available: int
    remainder_tokens: int
    sha256: str
    notes: tuple[str, ...]

    @property
    def num_scored_tokens(self) -> int:
        return int((self.tokens_WS.shape[1] - self.first_scored_W).sum())


def _check_settings(window_size: int, stride: int, max_tokens: int | None) -> None:
    if window_size < 2:
        raise UsageError(
            "--window-size",
            expected="at least 2, since the first token of a window is not scored",
            found=str(window_size),
            action="Give a larger window size.",
        )
    if not 1 <= stride <= window_size:
        raise UsageError(
            "--stride",
            expected=f"a number from 1 to the window size, {window_size}",
            found=str(stride),
            action="Give a stride in this range, or leave it out for windows that do not overlap.",
        )
    if max_tokens is not None and max_tokens < window_size:
        raise UsageError(
            "--max-tokens",
            expected=f"at least one window, {window_size} tokens",
            found=str(max_tokens),
            action="Give a larger number, or a smaller --window-size.",
        )


def evaluation_windows(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    window_size: int,
    max_tokens: int | None = None,
    stride: int | None = None,
) -> EvaluationWindows:
    """Return the windows that begin every `stride` tokens in the first `max_tokens` tokens of the joined documents.

    Args:
        documents: texts; they are joined without anything between them, and no BOS is added.
        tokenizer: of the model that is scored.
        window_size: tokens per window, at least 2.
        max_tokens: None reads all.
        stride: distance of window starts, None for `window_size`: no overlap.

    Raises:
        UsageError: a number that cannot be obeyed.
        TextError: the text does not fill one window.
    """
    step = window_size if stride is None else stride
    _check_settings(window_size, step, max_tokens)
    stream_T = torch.tensor(read_tokens(documents, tokenizer, max_tokens=max_tokens).joined()[:max_tokens])
    num_tokens = stream_T.numel()
    if num_tokens < window_size:
        raise TextError(
            "text",
            expected=f"at least {window_size} tokens, one window",
            found=f"{num_tokens} tokens",
            action="Name a longer text, or give a smaller --window-size.",
        )
    tokens_WS = stream_T.unfold(0, window_size, step).contiguous()
    num_windows = tokens_WS.shape[0]
    first_scored_W = torch.full((num_windows,), max(1, window_size - step), dtype=torch.int64)
    first_scored_W[0] = 1
    remainder = num_tokens - (num_windows - 1) * step - window_size
    return EvaluationWindows(
        tokens_WS=tokens_WS,
        first_scored_W=first_scored_W,
        num_tokens_available=num_tokens,
        remainder_tokens=remainder,
        sha256=tokens_sha256(tokens_WS),
        notes=(
            f"{num_windows} windows of {window_size} tokens, one every {step} tokens; "
            f"{remainder} tokens at the end fill no window.",
        ),
    )
