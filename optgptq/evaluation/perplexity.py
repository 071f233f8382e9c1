"""Perplexity of a model, and how far it has drifted from a baseline, over fixed windows of tokens.

Log-probabilities are taken in float32, sums over tokens in float64.
Shapes: `W` windows, `B` windows of a batch, `S` positions of a window, `T` scored tokens, `M` model width,
`V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from optgptq.errors import InputError, NumericalError, UsageError
from optgptq.memory import return_free_memory, smaller_batch

# A batch of 4096 tokens keeps two cores busy; more only costs memory.
_TOKENS_PER_BATCH = 4096
# Logits of a few positions at a time, 16 MB in float32: those of a whole window of a large vocabulary take gigabytes.
_LOGITS_PER_CHUNK = 1 << 22


class ScoringHead(Protocol):
    """Turns hidden states `[..., M]` into float32 logits `[..., V]`."""

    def logits(self, hidden_BSM: torch.Tensor, /) -> torch.Tensor: ...


class LanguageModel(Protocol):
    """What evaluation needs of a model; `optgptq.models.decoder.Decoder` has it."""

    @property
    def head(self) -> ScoringHead: ...

    @property
    def device(self) -> torch.device: ...

    def hidden(self, tokens_BS: torch.Tensor, /) -> torch.Tensor:
        """Return hidden states `[B, S, M]` for token ids `[B, S]`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Figures over all scored tokens.

    Attributes:
        perplexity: exponential of the candidate's mean negative log-likelihood.
        baseline_perplexity: the same of the baseline; None without one.
        mean_kl: mean over tokens of `KL(baseline || candidate)` in nats; None without a baseline.
        top1_agreement: share of tokens where both models rank the same token first; None without a baseline.
        num_tokens: scored tokens.
    """

    perplexity: float
    baseline_perplexity: float | None
    mean_kl: float | None
    top1_agreement: float | None
    num_tokens: int


@dataclass(slots=True)
class _Sums:
    """Running sums over scored tokens, float64 as Python floats."""

    candidate_nll: float = 0.0
    baseline_nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    num_tokens: int = 0


def evaluate(
    candidate: LanguageModel,
    tokens_WS: torch.Tensor,
    *,
    baseline: LanguageModel | None = None,
    first_scored_W: torch.Tensor | None = None,
    windows_per_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> EvalResult:
    """Score every window with the candidate, and with the baseline where one is given.

    Where memory runs out, batches are halved until one fits; the figures stay the same up to rounding.

    Args:
        candidate: the model to judge.
        tokens_WS: int64 `[W, S]`.
        baseline: the model to compare with; it must have the same vocabulary.
        first_scored_W: int64 `[W]`, the first position of each window whose token is scored, at least 1; None for 1:
            nothing predicts the first token of a window. Windows that overlap score only what is new.
        windows_per_batch: windows in one forward; None for about 4096 tokens.
        progress: called with windows done and windows in all, after each batch.
        warn: takes a sentence for the user where batches had to be smaller.

    Raises:
        MemoryError, RuntimeError: not even one window fits into the memory.
        UsageError: no window, or one without a token to score.
        InputError: the two models have different vocabularies.
        NumericalError: a model gives logits that are not finite.
    """
    num_windows, window_size = tokens_WS.shape
    starts = [1] * num_windows if first_scored_W is None else first_scored_W.tolist()
    _check_windows(starts, window_size)
    step = windows_per_batch or max(_TOKENS_PER_BATCH // window_size, 1)
    sums, begin = _Sums(), 0
    while begin < num_windows:
        end = _batch_end(starts, begin, step)
        # A batch that did not fit has left sums half-way.
        attempt = replace(sums)
        try:
            with torch.inference_mode():
                _score_batch(attempt, tokens_WS[begin:end], candidate, baseline=baseline, first_scored=starts[begin])
        except (MemoryError, RuntimeError) as error:
            step = smaller_batch(error, end - begin)
        else:
            sums, begin = attempt, end
            if progress is not None:
                progress(end, num_windows)
            continue
        return_free_memory()
        if warn is not None:
            warn(f"memory ran out: {step} instead of {end - begin} windows are scored at a time from window {begin} on")
    return _result(sums, has_baseline=baseline is not None)


def _batch_end(first_scored: list[int], begin: int, step: int) -> int:
    """Return the end of at most `step` consecutive windows from `begin` on that score the same positions."""
    end = begin + 1
    while end < min(begin + step, len(first_scored)) and first_scored[end] == first_scored[begin]:
        end += 1
    return end


def _check_windows(first_scored: list[int], window_size: int) -> None:
    if not first_scored or not all(1 <= first < window_size for first in first_scored):
        raise UsageError(
            "evaluation windows",
            expected="at least one window, and in each a token that follows another one",
            found=f"{len(first_scored)} windows of {window_size} tokens",
            action="Give a larger --window-size, or more text.",
        )


def _score_batch(
    sums: _Sums,
    tokens_BS: torch.Tensor,
    candidate: LanguageModel,
    *,
    baseline: LanguageModel | None,
    first_scored: int,
) -> None:
    """Add the tokens of positions `first_scored ..` of every window to the sums."""
    targets_T = tokens_BS[:, first_scored:].reshape(-1)
    candidate_TM = _predicting_states(candidate, tokens_BS, first_scored)
    baseline_TM = None if baseline is None else _predicting_states(baseline, tokens_BS, first_scored)
    begin, chunk = 0, 1
    while begin < targets_T.shape[0]:
        part = slice(begin, begin + chunk)
        candidate_TV = candidate.head.logits(candidate_TM[part])
        baseline_TV = None
        if baseline is not None and baseline_TM is not None:
            baseline_TV = baseline.head.logits(baseline_TM[part]).to(candidate_TV.device)
            _require_same_vocabulary(candidate_TV, baseline_TV)
        _score_chunk(sums, candidate_TV, baseline_TV, targets_T[part].to(candidate_TV.device))
        # The first position alone tells how wide the logits are.
        begin, chunk = begin + chunk, max(_LOGITS_PER_CHUNK // candidate_TV.shape[1], 1)


def _predicting_states(model: LanguageModel, tokens_BS: torch.Tensor, first_scored: int) -> torch.Tensor:
    """Return the hidden states `[T, M]` that predict positions `first_scored ..` of each window."""
    hidden_BSM = model.hidden(tokens_BS.to(model.device))
    return hidden_BSM[:, first_scored - 1 : -1].flatten(0, 1)


def _require_same_vocabulary(candidate_TV: torch.Tensor, baseline_TV: torch.Tensor) -> None:
    if baseline_TV.shape != candidate_TV.shape:
        raise InputError(
            "vocabulary of the two models",
            expected=f"{candidate_TV.shape[1]} entries in the baseline as in the candidate",
            found=str(baseline_TV.shape[1]),
            action="Compare a checkpoint with the model that it was made from.",
        )


def _score_chunk(
    sums: _Sums, candidate_TV: torch.Tensor, baseline_TV: torch.Tensor | None, targets_T: torch.Tensor
) -> None:
    log_candidate_TV = torch.log_softmax(candidate_TV, dim=-1)
    sums.candidate_nll += _negative_log_likelihood(log_candidate_TV, targets_T, "candidate")
    sums.num_tokens += targets_T.shape[0]
    if baseline_TV is None:
        return
    log_baseline_TV = torch.log_softmax(baseline_TV, dim=-1)
    sums.baseline_nll += _negative_log_likelihood(log_baseline_TV, targets_T, "baseline")
    sums.agreements += int((candidate_TV.argmax(-1) == baseline_TV.argmax(-1)).sum())
    difference_TV = log_baseline_TV - log_candidate_TV
    kl_T = difference_TV.mul_(log_baseline_TV.exp_()).sum(-1)
    sums.kl += _finite(float(kl_T.double().sum()), "the candidate and the baseline model")


def _negative_log_likelihood(log_probability_TV: torch.Tensor, targets_T: torch.Tensor, model: str) -> float:
    likelihood_T = log_probability_TV.gather(1, targets_T[:, None])
    return _finite(-float(likelihood_T.double().sum()), f"the {model} model")


def _finite(value: float, models: str) -> float:
    if not math.isfinite(value):
        raise NumericalError(
            f"logits of {models}",
            expected="finite log-probabilities of the text",
            found=str(value),
            action="Check the checkpoint with `optgptq verify`.",
        )
    return value


def _result(sums: _Sums, *, has_baseline: bool) -> EvalResult:
    count = sums.num_tokens
    return EvalResult(
        perplexity=_exponential(sums.candidate_nll / count),
        baseline_perplexity=_exponential(sums.baseline_nll / count) if has_baseline else None,
        mean_kl=sums.kl / count if has_baseline else None,
        top1_agreement=sums.agreements / count if has_baseline else None,
        num_tokens=count,
    )


def _exponential(value: float) -> float:
    """Return `exp(value)`, infinite where a float64 cannot hold it: a broken model must still be reported."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
