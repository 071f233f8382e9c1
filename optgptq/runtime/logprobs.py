"""How likely the model found the new tokens, and which ones it found likeliest.

Shapes: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optgptq.runtime.sampling_records import SampledToken, TokenLogprob
from optgptq.runtime.truncation import keep_first


def with_logprobs(logits_BV: Tensor, tokens: Sequence[int], counts: Mapping[int, int]) -> dict[int, SampledToken]:
    """Return the chosen tokens of some rows with their logprobs, by row.

    Args:
        logits_BV: float32 logits of the model, before any sampling parameter.
        tokens: chosen token of each row.
        counts: how many of the likeliest tokens to tell, for each row that wants logprobs.
    """
    if not counts:
        return {}
    rows, device = list(counts), logits_BV.device
    logprob_BV = torch.log_softmax(logits_BV[torch.tensor(rows, device=device)], dim=-1)
    token_B = torch.tensor([tokens[row] for row in rows], device=device)
    chosen_B = logprob_BV.gather(1, token_B[:, None]).squeeze(1)
    rank_B = _ranks(logprob_BV, token_B, chosen_B)
    top = _likeliest(logprob_BV, torch.tensor(list(counts.values()), device=device))
    found = {}
    for row, logprob, rank, best in zip(rows, chosen_B.tolist(), rank_B.tolist(), top, strict=True):
        token_id = tokens[row]
        own = () if rank <= len(best) else (TokenLogprob(token_id=token_id, logprob=logprob, rank=rank),)
        found[row] = SampledToken(token_id=token_id, logprob=logprob, top_logprobs=(*best, *own))
    return found


def _ranks(logprob_BV: Tensor, token_B: Tensor, chosen_B: Tensor) -> Tensor:
    """Return the place of each chosen token, from 1, with equal ones in the order of their ids."""
    is_lower_BV = torch.arange(logprob_BV.shape[1], device=logprob_BV.device) < token_B[:, None]
    is_before_BV = (logprob_BV > chosen_B[:, None]) | ((logprob_BV == chosen_B[:, None]) & is_lower_BV)
    return is_before_BV.sum(-1) + 1


def _likeliest(logprob_BV: Tensor, count_B: Tensor) -> list[tuple[TokenLogprob, ...]]:
    """Return the `count_B` likeliest tokens of each row, sorted; which of equal values topk takes is not defined."""
    width = max(1, int(count_B.amax()))
    last_B = count_B.clamp(min=1) - 1
    threshold_B = logprob_BV.topk(width, dim=-1).values.gather(1, last_B[:, None]).squeeze(1)
    is_kept_BV = keep_first(logprob_BV, threshold_B, count_B)
    found: list[list[tuple[float, int]]] = [[] for _ in range(len(logprob_BV))]
    places = is_kept_BV.nonzero().tolist()
    for (row, token_id), logprob in zip(places, logprob_BV[is_kept_BV].tolist(), strict=True):
        found[row].append((-logprob, token_id))
    return [
        tuple(
            TokenLogprob(token_id=token_id, logprob=-negative, rank=place + 1)
            for place, (negative, token_id) in enumerate(sorted(entries))
        )
        for entries in found
    ]
