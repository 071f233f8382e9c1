"""Which tokens top-k and top-p leave to choose from.

Both keep a beginning of the tokens sorted from the likeliest down, equally likely ones by id. Probabilities come as
whole numbers, whose sums are exact: the result depends neither on the order of summation nor on other rows.

Shapes: `B` rows, `V` vocabulary, `C` candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Usually far more than top-p keeps, and an order of magnitude cheaper to find than the order of a whole vocabulary.
FIRST_CANDIDATES = 1024


def truncate(logits_BV: Tensor, weight_BV: Tensor, *, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Return the weights with 0 for tokens that top-k and then top-p leave out.

    Args:
        logits_BV: float logits; they give the order.
        weight_BV: int64, proportional to the probabilities, with a total below `2**63`.
        top_k_B: int64, 1 to V; V keeps all.
        top_p_B: float64, more than 0 and at most 1; a share of what top-k leaves.
    """
    vocab_size = logits_BV.shape[1]
    short_k_B, short_p_B = top_k_B < vocab_size, top_p_B < 1
    widest_k = int(torch.where(short_k_B, top_k_B, 1).amax())
    width = min(vocab_size, max(widest_k, FIRST_CANDIDATES if bool(short_p_B.any()) else 1))
    threshold_B, count_B, is_enough_B = _prefix(logits_BV, weight_BV, top_k_B, top_p_B, width=width)
    far_B = (~is_enough_B).nonzero().squeeze(1)
    if len(far_B):
        all_of = [tensor[far_B] for tensor in (logits_BV, weight_BV, top_k_B, top_p_B)]
        threshold_B[far_B], count_B[far_B], _ = _prefix(*all_of, width=vocab_size)
    is_kept_BV = keep_first(logits_BV, threshold_B, count_B) | ~(short_k_B | short_p_B)[:, None]
    return weight_BV.masked_fill(~is_kept_BV, 0)


def _prefix(
    logits_BV: Tensor, weight_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, *, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logit of the last token kept, how many are kept, and whether `width` candidates were enough."""
    top_BC, token_BC = logits_BV.topk(width, dim=-1)
    is_allowed_BC = torch.arange(width, device=logits_BV.device) < top_k_B[:, None]
    weight_BC = weight_BV.gather(1, token_BC) * is_allowed_BC
    seen_B = weight_BC.sum(-1)
    total_B = torch.where(top_k_B <= width, seen_B, weight_BV.sum(-1))
    share_B = (top_p_B * total_B.double()).ceil().to(torch.int64)
    goal_B = torch.where(top_p_B < 1, share_B, total_B)
    before_BC = weight_BC.cumsum(-1) - weight_BC
    count_B = ((before_BC < goal_B[:, None]) & is_allowed_BC).sum(-1).clamp(min=1)
    threshold_B = top_BC.gather(1, count_B[:, None] - 1).squeeze(1)
    # A row that nothing is taken from needs no candidates: it must not cause the search over the whole vocabulary.
    is_whole_B = (top_k_B >= logits_BV.shape[1]) & (top_p_B >= 1)
    return threshold_B, count_B, (top_k_B <= width) | (seen_B >= goal_B) | is_whole_B


def keep_first(value_BV: Tensor, threshold_B: Tensor, count_B: Tensor) -> Tensor:
    """Return the `count_B` greatest values as a mask, given the least of them; of equal ones the lower ids."""
    is_above_BV = value_BV > threshold_B[:, None]
    is_equal_BV = value_BV == threshold_B[:, None]
    room_B = count_B - is_above_BV.sum(-1)
    return is_above_BV | (is_equal_BV & (is_equal_BV.cumsum(-1) <= room_B[:, None]))
