"""A short list of ranges from which every group takes the one that loses least.

Shapes: `T` vectors, `K` heads, `D` head dimension, `C` candidate ranges.
"""

from __future__ import annotations

from itertools import product

import torch

from optgptq.kernels.through_codes import through_codes
from optgptq.kv_cache.codec import SideCodec
from optgptq.kv_cache.scheme import SideScheme

# Shares of the distance from the middle that an end of a range may keep. Few bits gain from cutting far.
_SHARES: dict[int, tuple[float, ...]] = {
    8: (1.0,),
    4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.7),
    3: (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6),
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
}


def chosen_ranges(
    stored_TKD: torch.Tensor, metric_KDD: torch.Tensor, scheme: SideScheme, *, max_ranges: int
) -> torch.Tensor:
    """Return float32 `[C, 2]`, the whole range first: each next one lowers the loss most beside those before it.

    The loss is that of plain rounding, weighted by the metric's diagonal and equalised over heads.
    """
    shares = _SHARES[scheme.bits] if max_ranges > 1 else (1.0,)
    pairs = list(product(shares, shares))
    losses = torch.stack([_losses(stored_TKD, metric_KDD, scheme, pair) for pair in pairs])
    losses = losses / losses[0].sum((0, 2), keepdim=True).clamp_min(torch.finfo(losses.dtype).tiny)
    chosen, best = [0], losses[0]
    while len(chosen) < min(max_ranges, len(pairs)):
        totals = torch.minimum(losses, best).sum((1, 2, 3))
        index = int(totals.argmin())
        if index in chosen or float(totals[index]) >= float(best.sum()):
            break
        chosen.append(index)
        best = torch.minimum(best, losses[index])
    return torch.tensor([pairs[index] for index in chosen], dtype=torch.float32)


def even_ranges(bits: int) -> torch.Tensor:
    """Return float32 `[C, 2]`: ranges cut by the same share at both ends, the whole one first."""
    return torch.tensor([(share, share) for share in _SHARES[bits]], dtype=torch.float32)


def _losses(
    stored_TKD: torch.Tensor, metric_KDD: torch.Tensor, scheme: SideScheme, pair: tuple[float, float]
) -> torch.Tensor:
    """Return the weighted squared error of each vector, head and group under one range, `[T, K, G]`."""
    codec = SideCodec(scheme=scheme, ranges_C2=torch.tensor([pair], device=stored_TKD.device))
    error_TKD = (stored_TKD - through_codes(stored_TKD, codec)).square()
    weighted_TKD = error_TKD * metric_KDD.diagonal(dim1=1, dim2=2)
    return weighted_TKD.view(*weighted_TKD.shape[:2], -1, scheme.group_size).sum(3)
