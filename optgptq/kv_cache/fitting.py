"""Codes, scales and minimums fitted to what an error of a vector costs. Formulas: `docs/math/kv-cache-codes.md`.

Shapes: `T` tokens, `K` key/value heads, `D` head dimension, `G` groups of a head, `L` channels of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optgptq.kv_cache.rounding import nearest

if TYPE_CHECKING:
    from optgptq.kv_cache.codec import SideCodec

# Share of the metric's mean diagonal that is added to it, as damping, where error feedback is made from it.
FEEDBACK_DAMP = 0.01
# Times that scale and minimum are fitted to the codes, and the codes then searched once more.
NUM_REFITS = 2
# A fit whose matrix is closer to singular than this is skipped.
_SMALLEST_DETERMINANT = 1e-6


def error_feedback(metric_KDD: torch.Tensor) -> torch.Tensor:
    """Return the float32 feedback of a metric `H`: minus the rows of the upper Cholesky factor of `H^-1`, scaled.

    Each row is divided by its diagonal, which then is left out.
    Source: Frantar et al., GPTQ, arXiv 2210.17323, section 3.3, applied to one vector instead of the rows of a matrix.
    """
    metric = metric_KDD.double()
    mean_K = metric.diagonal(dim1=1, dim2=2).mean(1)
    # A head that nothing reads has no metric at all; any positive one serves.
    damping_K = torch.where(mean_K > 0, FEEDBACK_DAMP * mean_K, torch.ones_like(mean_K))
    identity = torch.eye(metric.shape[1], dtype=metric.dtype, device=metric.device)
    factor = torch.linalg.cholesky(torch.linalg.inv(metric + damping_K[:, None, None] * identity), upper=True)
    rows = -factor / factor.diagonal(dim1=1, dim2=2).unsqueeze(2)
    feedback_KDD: torch.Tensor = rows.triu(1).float()
    return feedback_KDD


def fit_codes(
    x_TKD: torch.Tensor, scale_TKG: torch.Tensor, minimum_TKG: torch.Tensor, codec: SideCodec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scale and minimum fitted to the metric.

    Rounding with error feedback; one search through the channels; then, as long as the loss falls, at most `NUM_REFITS`
    times: scale and minimum of each group by least squares, and one more search.
    """
    metric_KDD, size, bits = codec.metric_KDD, codec.scheme.group_size, codec.scheme.bits
    assert metric_KDD is not None
    code_TKD = _round_with_feedback(x_TKD, scale_TKG, minimum_TKG, codec)
    code_TKD, gradient_TKD = _search(x_TKD, code_TKD, scale_TKG, minimum_TKG, metric_KDD, size=size, bits=bits)
    loss_TK = _loss(x_TKD, code_TKD, scale_TKG, minimum_TKG, gradient_TKD, size=size)
    for _ in range(NUM_REFITS):
        scale, minimum = _refit(code_TKD, gradient_TKD, scale_TKG, minimum_TKG, metric_KDD, size=size)
        code, gradient = _search(x_TKD, code_TKD, scale, minimum, metric_KDD, size=size, bits=bits)
        loss = _loss(x_TKD, code, scale, minimum, gradient, size=size)
        falls = loss < loss_TK
        whole = falls[..., None]
        code_TKD, gradient_TKD = torch.where(whole, code, code_TKD), torch.where(whole, gradient, gradient_TKD)
        scale_TKG, minimum_TKG = torch.where(whole, scale, scale_TKG), torch.where(whole, minimum, minimum_TKG)
        loss_TK = torch.where(falls, loss, loss_TK)
    return code_TKD, scale_TKG, minimum_TKG


def _round_with_feedback(
    x_TKD: torch.Tensor, scale_TKG: torch.Tensor, minimum_TKG: torch.Tensor, codec: SideCodec
) -> torch.Tensor:
    feedback_KDD, size = codec.feedback_KDD, codec.scheme.group_size
    assert feedback_KDD is not None
    moved_TKD, code_TKD = x_TKD.clone(), torch.empty_like(x_TKD)
    for channel in range(x_TKD.shape[2]):
        scale, minimum = scale_TKG[..., channel // size], minimum_TKG[..., channel // size]
        code_TKD[..., channel] = nearest(moved_TKD[..., channel], scale, minimum, codec.scheme.bits)
        error = moved_TKD[..., channel] - (code_TKD[..., channel] * scale + minimum)
        moved_TKD = moved_TKD + error[..., None] * feedback_KDD[:, channel]
    return code_TKD


def _search(
    x_TKD: torch.Tensor,
    code_TKD: torch.Tensor,
    scale_TKG: torch.Tensor,
    minimum_TKG: torch.Tensor,
    metric_KDD: torch.Tensor,
    *,
    size: int,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes after each channel has once taken the code that is best beside all others, and `metric @ error`."""
    code_TKD = code_TKD.clone()
    error_TKD = _error(x_TKD, code_TKD, scale_TKG, minimum_TKG, size=size)
    gradient_TKD = torch.matmul(metric_KDD, error_TKD[..., None])[..., 0]
    for channel in range(x_TKD.shape[2]):
        scale = scale_TKG[..., channel // size]
        diagonal = metric_KDD[:, channel, channel]
        step = gradient_TKD[..., channel] / torch.where(scale * diagonal > 0, scale * diagonal, torch.inf)
        code = (code_TKD[..., channel] + step).round().clamp(0, 2**bits - 1)
        code = torch.where(torch.isfinite(code), code, code_TKD[..., channel])
        change = (code - code_TKD[..., channel]) * scale
        code_TKD[..., channel] = code
        gradient_TKD = gradient_TKD - change[..., None] * metric_KDD[:, channel]
    return code_TKD, gradient_TKD


def _refit(
    code_TKD: torch.Tensor,
    gradient_TKD: torch.Tensor,
    scale_TKG: torch.Tensor,
    minimum_TKG: torch.Tensor,
    metric_KDD: torch.Tensor,
    *,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and minimum of each group that lose least, the other groups as they are; rounded to float16."""
    scales, minimums = [], []
    for group in range(scale_TKG.shape[2]):
        part = slice(group * size, (group + 1) * size)
        block_KLL, code_TKL, gradient_TKL = metric_KDD[:, part, part], code_TKD[..., part], gradient_TKD[..., part]
        image_TKL = torch.matmul(block_KLL, code_TKL[..., None])[..., 0]
        cc, cm, mm = (code_TKL * image_TKL).sum(-1), image_TKL.sum(-1), block_KLL.sum((1, 2))
        cg, mg = (code_TKL * gradient_TKL).sum(-1), gradient_TKL.sum(-1)
        determinant = cc * mm - cm * cm
        is_sound = determinant > _SMALLEST_DETERMINANT * cc * mm
        divisor = torch.where(is_sound, determinant, 1.0)
        scale = (scale_TKG[..., group] + (cg * mm - mg * cm) / divisor).half().float()
        minimum = (minimum_TKG[..., group] + (mg * cc - cg * cm) / divisor).half().float()
        is_sound &= (scale > 0) & torch.isfinite(scale) & torch.isfinite(minimum)
        scales.append(torch.where(is_sound, scale, scale_TKG[..., group]))
        minimums.append(torch.where(is_sound, minimum, minimum_TKG[..., group]))
    return torch.stack(scales, -1), torch.stack(minimums, -1)


def _error(
    x_TKD: torch.Tensor, code_TKD: torch.Tensor, scale_TKG: torch.Tensor, minimum_TKG: torch.Tensor, *, size: int
) -> torch.Tensor:
    return x_TKD - (code_TKD * scale_TKG.repeat_interleave(size, 2) + minimum_TKG.repeat_interleave(size, 2))


def _loss(
    x_TKD: torch.Tensor,
    code_TKD: torch.Tensor,
    scale_TKG: torch.Tensor,
    minimum_TKG: torch.Tensor,
    gradient_TKD: torch.Tensor,
    *,
    size: int,
) -> torch.Tensor:
    return (_error(x_TKD, code_TKD, scale_TKG, minimum_TKG, size=size) * gradient_TKD).sum(-1)
