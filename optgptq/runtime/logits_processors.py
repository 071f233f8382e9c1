"""Changes to logits before a token is chosen: a user's own processors, bias, `min_tokens`, penalties, in this order.

Shapes: `B` rows, `V` vocabulary. All arithmetic is float32, element by element: no row sees another.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from optgptq.errors import OptGPTQError, UsageError
from optgptq.runtime.sampling_records import SamplingRow
from optgptq.scheduling.sampling_params import LogitsProcessor, SamplingParams


def adjust_logits(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> dict[int, OptGPTQError]:
    """Change float32 logits in place as the rows' parameters say.

    Returns:
        What went wrong in a user's processor, by row; the logits of such a row mean nothing.
    """
    failures: dict[int, OptGPTQError] = {}
    for index, row in enumerate(rows):
        for processor in row.params.processors:
            failure = _apply(processor, row, logits_BV[index])
            if failure is not None:
                failures[index] = failure
                break
    _add_bias(logits_BV, rows)
    _hold_back_ends(logits_BV, rows)
    _penalize(logits_BV, rows)
    return failures


def _apply(processor: LogitsProcessor, row: SamplingRow, logits_V: Tensor) -> OptGPTQError | None:
    try:
        changed_V = processor(row.prompt_ids, row.output_ids, logits_V)
    except Exception as error:  # noqa: BLE001 - a user's code may raise anything; only its own request must fail
        return _failure(processor, "changed logits", f"{type(error).__name__}: {error}")
    if not isinstance(changed_V, Tensor):
        return _failure(processor, "a tensor of logits", type(changed_V).__name__)
    if changed_V.shape != logits_V.shape or not changed_V.is_floating_point():
        found = f"{changed_V.dtype} of shape {list(changed_V.shape)}"
        return _failure(processor, f"float logits of shape {list(logits_V.shape)}", found)
    if changed_V is not logits_V:
        logits_V.copy_(changed_V)
    return None


def _failure(processor: LogitsProcessor, expected: str, found: str) -> OptGPTQError:
    name = processor.__qualname__ if inspect.isroutine(processor) else type(processor).__qualname__
    return UsageError(
        f"logits processor {name}",
        expected=expected,
        found=found,
        action="Correct this processor, or leave it out of logits_processors.",
    )


def _add_bias(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = [
        (index, token_id, bias)
        for index, row in enumerate(rows)
        for token_id, bias in (row.params.logit_bias or {}).items()
    ]
    if entries:
        indices, token_ids, biases = zip(*entries, strict=True)
        device = logits_BV.device
        places = (torch.tensor(indices, device=device), torch.tensor(token_ids, device=device))
        # A place occurs once, so there is one sum for it.
        logits_BV[places] += torch.tensor(biases, dtype=torch.float64, device=device).float()


def _hold_back_ends(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Make tokens that end a text impossible where `min_tokens` are not written yet."""
    vocab_size = logits_BV.shape[1]
    places = [
        (index, token_id)
        for index, row in enumerate(rows)
        if row.num_written < row.params.min_tokens
        # A tokenizer may know an end-of-text token that the model has no logit for.
        for token_id in {*row.eos_token_ids, *row.params.stop_ids}
        if token_id < vocab_size
    ]
    if places:
        place = torch.tensor(places, device=logits_BV.device)
        logits_BV[place[:, 0], place[:, 1]] = -torch.inf


def _is_penalized(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def _penalize(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> None:
    chosen = [index for index, row in enumerate(rows) if _is_penalized(row.params)]
    if not chosen:
        return
    device = logits_BV.device
    some = [rows[index] for index in chosen]
    index_B = torch.tensor(chosen, device=device)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device).float()[:, None]

    penalized_BV = logits_BV[index_B]
    written_BV = _counts([row.output_ids for row in some], penalized_BV)
    seen_BV = (written_BV > 0) | (_counts([row.prompt_ids for row in some], penalized_BV) > 0)
    repetition_B1 = column([row.params.repetition_penalty for row in some])
    weakened_BV = torch.where(penalized_BV > 0, penalized_BV / repetition_B1, penalized_BV * repetition_B1)
    penalized_BV = torch.where(seen_BV, weakened_BV, penalized_BV)
    penalized_BV -= column([row.params.frequency_penalty for row in some]) * written_BV
    penalized_BV -= column([row.params.presence_penalty for row in some]) * (written_BV > 0)
    logits_BV[index_B] = penalized_BV


def _counts(ids: list[Sequence[int]], like_BV: Tensor) -> Tensor:
    """Return how often each row holds each token, int32 `[B, V]`."""
    device = like_BV.device
    counts_BV = torch.zeros(like_BV.shape, dtype=torch.int32, device=device)
    lengths = torch.tensor([len(row) for row in ids])
    index_T = torch.repeat_interleave(torch.arange(len(ids)), lengths).to(device)
    token_T = torch.tensor([token_id for row in ids for token_id in row], dtype=torch.int64).to(device)
    one_T = torch.ones(len(token_T), dtype=torch.int32, device=device)
    return counts_BV.index_put_((index_T, token_T), one_T, accumulate=True)
