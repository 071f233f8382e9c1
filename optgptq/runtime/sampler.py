"""From logits to the next token of every text of a step.

A row's result depends on that row alone: logits are changed element by element, probabilities are summed as whole
numbers, and the random number is a function of seed, fork and number of the token. docs/sampling.md gives the order.

Shapes: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optgptq.errors import NumericalError, OptGPTQError, UsageError
from optgptq.native.leaves import draw, greatest, takes_leaves
from optgptq.runtime.counter_random import uniforms
from optgptq.runtime.logits_processors import adjust_logits
from optgptq.runtime.logprobs import with_logprobs
from optgptq.runtime.sampling_records import SampledToken, SamplingRow, TokenLogprob
from optgptq.runtime.truncation import truncate
from optgptq.scheduling.sampling_params import SamplingParams

__all__ = ["SampledToken", "SamplingRow", "TokenLogprob", "sample"]

NO_TOKEN = -1
# Sampling needs about 30 bytes per logit; rows beyond this many logits are taken in turn.
BLOCK_LOGITS = 1 << 23


def sample(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Return the next token of each row, or why there is none.

    Args:
        logits_BV: float32 logits of the model; not changed.
        rows: one per row of logits.
    """
    assert logits_BV.dtype == torch.float32
    assert len(logits_BV) == len(rows)
    if not rows:
        return []
    likeliest_B, best_B = _likeliest(logits_BV)
    tokens: list[int] = likeliest_B.tolist()
    failures: dict[int, OptGPTQError] = {
        index: _not_numbers(best_B[index]) for index, token in enumerate(tokens) if token == NO_TOKEN
    }
    special = [index for index, row in enumerate(rows) if index not in failures and not _is_plain(row.params)]
    if special:
        some = [rows[index] for index in special]
        changed_BV, problems = _rows_of(logits_BV, special), {}
        if any(_is_adjusted(row.params) for row in some):
            changed_BV = changed_BV.clone() if changed_BV is logits_BV else changed_BV
            problems = adjust_logits(changed_BV, some)
        for place, (index, token) in enumerate(zip(special, _choose(changed_BV, some), strict=True)):
            tokens[index] = token
            if place in problems:
                failures[index] = problems[place]
            elif token == NO_TOKEN:
                failures[index] = _nothing_left()
    wanted = [index for index, row in enumerate(rows) if index not in failures and row.params.logprobs is not None]
    detailed = with_logprobs(logits_BV, tokens, {index: rows[index].params.logprobs or 0 for index in wanted})
    return [
        SampledToken(token_id=0, error=failures[index])
        if index in failures
        else detailed.get(index, SampledToken(token_id=token))
        for index, token in enumerate(tokens)
    ]


def _is_plain(params: SamplingParams) -> bool:
    """Whether the likeliest token of the model is the answer."""
    return params.is_greedy and not _is_adjusted(params)


def _is_adjusted(params: SamplingParams) -> bool:
    """Whether the logits are changed before a token is chosen."""
    return bool(
        params.processors
        or params.logit_bias
        or params.min_tokens
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
    )


def _likeliest(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first of the greatest logits of each row and its value; `NO_TOKEN` where that is not finite.

    NaN counts as the greatest, so one look at the greatest finds it.
    """
    token_B = greatest(logits_BV) if _has_leaves(logits_BV) else logits_BV.argmax(-1)
    best_B = logits_BV.gather(1, token_B[:, None]).squeeze(1)
    return torch.where(torch.isfinite(best_B), token_B, NO_TOKEN), best_B


def _choose(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Return a token for each row of changed logits; `NO_TOKEN` where no logit is finite or one is NaN or +inf."""
    token_B, best_B = _likeliest(logits_BV)
    drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    block = max(1, BLOCK_LOGITS // logits_BV.shape[1])
    for begin in range(0, len(drawn), block):
        part = drawn[begin : begin + block]
        index_B = torch.tensor(part, device=logits_BV.device)
        choice_B = _draw(_rows_of(logits_BV, part), best_B[index_B], [rows[index] for index in part])
        token_B[index_B] = torch.where(token_B[index_B] == NO_TOKEN, NO_TOKEN, choice_B)
    tokens: list[int] = token_B.tolist()
    return tokens


def _draw(logits_BV: Tensor, best_B: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return a random token of each row by inverting the cumulative distribution, int64 `[B]`."""
    params, vocab_size = [row.params for row in rows], logits_BV.shape[1]
    numbers = [row.num_written for row in rows]
    uniform = uniforms([row.seed for row in rows], [row.fork for row in rows], numbers)
    uniform_B = torch.from_numpy(uniform).to(logits_BV.device)
    if _has_leaves(logits_BV) and all(_keeps_all(row, vocab_size) for row in params):
        temperature_B = torch.tensor([row.temperature for row in params], dtype=torch.float64)
        bits = _weight_bits(vocab_size)
        return draw(logits_BV, best_B, temperature_B=temperature_B, uniform_B=uniform_B, bits=bits)
    weight_BV = _weights(logits_BV, best_B, params)
    cumulative_BV = weight_BV.cumsum(-1)
    total_B = cumulative_BV[:, -1]
    # Rounding may give the total itself, which lies behind the last token.
    target_B = torch.minimum((uniform_B * total_B.double()).to(torch.int64), total_B - 1)
    choice_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True).squeeze(1)
    return choice_B.clamp(max=vocab_size - 1)  # rows without any weight: their choice is not used


def _weights(logits_BV: Tensor, best_B: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return whole numbers proportional to the probabilities after temperature, min-p, top-k and top-p, int64 `[B, V]`.

    The likeliest token has the weight `2**bits`, with the most bits for which no total reaches `2**62`: 45 for a
    vocabulary of 100,000. Less likely tokens lose what is below 1.
    """
    vocab_size, device = logits_BV.shape[1], logits_BV.device

    def vector(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    temperature_B = vector([row.temperature for row in params])
    # The greatest is taken off first, so that no temperature overflows: it is 0, all others are below.
    share_BV = (logits_BV.double() - best_B.double()[:, None]).div_(temperature_B[:, None]).exp_()
    share_BV.nan_to_num_(0.0)  # rows whose choice is not used
    if any(row.min_p > 0 for row in params):
        min_p_B = vector([row.min_p for row in params])
        share_BV.masked_fill_(share_BV < min_p_B[:, None], 0.0)
    weight_BV = share_BV.mul_(2.0 ** _weight_bits(vocab_size)).to(torch.int64)
    if all(row.top_p == 1 and not 0 < row.top_k < vocab_size for row in params):
        return weight_BV
    top_k = [row.top_k if 0 < row.top_k < vocab_size else vocab_size for row in params]
    top_k_B, top_p_B = torch.tensor(top_k, device=device), vector([row.top_p for row in params])
    return truncate(logits_BV, weight_BV, top_k_B=top_k_B, top_p_B=top_p_B)


def _rows_of(logits_BV: Tensor, numbers: list[int]) -> Tensor:
    """Return some rows, in ascending order; the tensor itself where that is all of them."""
    return logits_BV if len(numbers) == len(logits_BV) else logits_BV[torch.tensor(numbers, device=logits_BV.device)]


def _weight_bits(vocab_size: int) -> int:
    return 62 - vocab_size.bit_length()


def _keeps_all(params: SamplingParams, vocab_size: int) -> bool:
    """Whether no token is left out for its small probability."""
    return params.min_p <= 0 and params.top_p == 1 and not 0 < params.top_k < vocab_size


def _has_leaves(logits_BV: Tensor) -> bool:
    return takes_leaves(logits_BV.device, logits_BV.dtype) and logits_BV.is_contiguous()


def _not_numbers(best: Tensor) -> OptGPTQError:
    return NumericalError(
        "logits",
        expected="numbers, the greatest of them finite",
        found=str(best.item()),
        action="Check the checkpoint with `optgptq verify`.",
    )


def _nothing_left() -> OptGPTQError:
    return UsageError(
        "logits after the sampling parameters",
        expected="numbers, the greatest of them finite",
        found="no token that can be chosen",
        action="Change logits_processors, logit_bias, min_tokens or the penalties so that some token is left.",
    )
