"""The range of a group of numbers, and the code next to a number. Formulas: `docs/math/kv-cache-codes.md`.

Shapes: `T` tokens, `K` key/value heads, `G` groups of a head, `L` numbers of a group, `C` candidate ranges.
"""

from __future__ import annotations

import torch

# The largest number of float16.
LARGEST = 65504.0


def choose_range(
    x_TKGL: torch.Tensor, weight_KGL: torch.Tensor | None, ranges_C2: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and minimum `[T, K, G]`, values of float16 in float32.

    Of the candidates, the first whose squared errors, times `weight_KGL`, add up to least; without weights all count 1.
    """
    limit = 2**bits - 1
    finite_TKG = torch.isfinite(x_TKGL).all(-1)
    x_TKGL = torch.where(finite_TKG[..., None], x_TKGL, 0.0).clamp(-LARGEST, LARGEST)
    low_TKG, high_TKG = x_TKGL.amin(-1), x_TKGL.amax(-1)
    middle_TKG = (low_TKG + high_TKG) / 2
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for low_share, high_share in ranges_C2.unbind(0):
        low = middle_TKG + (low_TKG - middle_TKG) * low_share
        high = middle_TKG + (high_TKG - middle_TKG) * high_share
        scale, minimum = ((high - low) / limit).half().float(), low.half().float()
        if len(ranges_C2) == 1:
            best = (low, scale, minimum)
            break
        code = nearest(x_TKGL, scale[..., None], minimum[..., None], bits)
        error = (x_TKGL - (code * scale[..., None] + minimum[..., None])).square()
        loss = (error if weight_KGL is None else error * weight_KGL).sum(-1)
        if best is None:
            best = (loss, scale, minimum)
        else:
            is_better = loss < best[0]
            best = (
                torch.where(is_better, loss, best[0]),
                torch.where(is_better, scale, best[1]),
                torch.where(is_better, minimum, best[2]),
            )
    assert best is not None
    _, scale_TKG, minimum_TKG = best
    return torch.where(finite_TKG, scale_TKG, 0.0), torch.where(finite_TKG, minimum_TKG, torch.nan)


def nearest(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, bits: int) -> torch.Tensor:
    """Return float codes; 0 where the scale is 0 or anything is not finite. Halves go to even."""
    code = ((x - minimum) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, 2**bits - 1)
    return torch.where((scale > 0) & torch.isfinite(code), code, 0.0)
