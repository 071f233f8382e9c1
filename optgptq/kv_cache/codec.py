"""From vectors to codes and back: the definition that every kernel is compared with, in torch.

All of it in float32. A group of numbers gets a scale `s` and a minimum `m`, both rounded to float16 before any code is
chosen; a code `c` stands for `s * c + m`. Formulas: `docs/math/kv-cache-codes.md`.

Shapes: `T` tokens, `K` key/value heads, `D` head dimension, `G` groups of a head, `L` channels of a group, `C` candidate
ranges. A codec for groups along tokens (`axis` `token`) reads whole groups of tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.kv_cache.scheme import SideScheme
from optgptq.kv_cache.setup import SideParameters

LARGEST = 65504.0
# Share of the metric's mean diagonal that is added to it, as damping, where error feedback is made from it.
FEEDBACK_DAMP = 0.01
# Times that scale and minimum are fitted to the codes, and the codes then searched once more.
NUM_REFITS = 2
# A fit whose matrix is closer to singular than this is skipped.
_SMALLEST_DETERMINANT = 1e-6


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SideCodec:
    """How vectors of one side of one decoder layer become codes.

    Attributes:
        scheme: bits and groups; not exact.
        ranges_C2: float32 shares; see `SideParameters`. At least one row.
        metric_KDD: float32; None: each number is rounded to the nearest.
        feedback_KDD: float32, made from the metric: an error `e` of channel `d` adds `e * feedback[d, d']` to each later
            channel `d'`; zero on and below the diagonal. None where the metric is.
    """

    scheme: SideScheme
    ranges_C2: torch.Tensor
    metric_KDD: torch.Tensor | None = None
    feedback_KDD: torch.Tensor | None = None

    @classmethod
    def of(cls, scheme: SideScheme, parameters: SideParameters, device: torch.device) -> SideCodec:
        """Return the codec of a side. Groups along tokens take no metric."""
        ranges_C2 = parameters.ranges_C2
        if ranges_C2 is None:
            ranges_C2 = torch.ones(1, 2)
        metric_KDD = parameters.metric_KDD if scheme.axis == "channel" else None
        feedback_KDD = None if metric_KDD is None else error_feedback(metric_KDD).to(device)
        metric_KDD = None if metric_KDD is None else metric_KDD.float().to(device)
        return cls(
            scheme=scheme, ranges_C2=ranges_C2.float().to(device), metric_KDD=metric_KDD, feedback_KDD=feedback_KDD
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Codes:
    """Encoded vectors.

    Attributes:
        code_TKD: uint8.
        scale_TKG, minimum_TKG: float16. With groups along tokens `[T / group_size, K, D]`.
    """

    code_TKD: torch.Tensor
    scale_TKG: torch.Tensor
    minimum_TKG: torch.Tensor


def error_feedback(metric_KDD: torch.Tensor) -> torch.Tensor:
    """Return the float32 feedback of a metric `H`: minus the rows of the upper Cholesky factor of `H^-1`, over its diagonal.

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


def encode(x_TKD: torch.Tensor, codec: SideCodec) -> Codes:
    """Return codes of float32 vectors.

    A group with a number that is not finite gets minimum NaN and codes 0: it is seen in every result. Numbers beyond
    float16 count as its largest.
    """
    x_TKD = x_TKD.float()
    if codec.scheme.axis == "token":
        return _encode_along_tokens(x_TKD, codec)
    num_tokens, num_kv_heads = x_TKD.shape[:2]
    x_TKGL = x_TKD.reshape(num_tokens, num_kv_heads, -1, codec.scheme.group_size)
    weight_KGL = None
    if codec.metric_KDD is not None:
        weight_KGL = codec.metric_KDD.diagonal(dim1=1, dim2=2).reshape(x_TKGL.shape[1:])
    scale_TKG, minimum_TKG = _choose_range(x_TKGL, weight_KGL, codec)
    if codec.metric_KDD is None:
        code_TKD = _nearest(x_TKGL, scale_TKG[..., None], minimum_TKG[..., None], codec.scheme.bits).flatten(2)
    else:
        code_TKD, scale_TKG, minimum_TKG = _fit(x_TKD, scale_TKG, minimum_TKG, codec)
    return Codes(code_TKD=code_TKD.to(torch.uint8), scale_TKG=scale_TKG.half(), minimum_TKG=minimum_TKG.half())


def decode(codes: Codes, scheme: SideScheme) -> torch.Tensor:
    """Return float32 vectors `[T, K, D]`."""
    code_TKD = codes.code_TKD.float()
    scale, minimum = codes.scale_TKG.float(), codes.minimum_TKG.float()
    if scheme.axis == "token":
        return code_TKD * scale.repeat_interleave(scheme.group_size, 0) + minimum.repeat_interleave(
            scheme.group_size, 0
        )
    return code_TKD * scale.repeat_interleave(scheme.group_size, 2) + minimum.repeat_interleave(scheme.group_size, 2)


def _encode_along_tokens(x_TKD: torch.Tensor, codec: SideCodec) -> Codes:
    """Groups of tokens of a channel: the same steps with the axes exchanged."""
    size = codec.scheme.group_size
    x_TKDL = x_TKD.reshape(-1, size, *x_TKD.shape[1:]).permute(0, 2, 3, 1)
    scale, minimum = _choose_range(x_TKDL, None, codec)
    code = _nearest(x_TKDL, scale[..., None], minimum[..., None], codec.scheme.bits)
    code_TKD = code.permute(0, 3, 1, 2).reshape(x_TKD.shape)
    return Codes(code_TKD=code_TKD.to(torch.uint8), scale_TKG=scale.half(), minimum_TKG=minimum.half())


def _choose_range(
    x_TKGL: torch.Tensor, weight_KGL: torch.Tensor | None, codec: SideCodec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and minimum `[T, K, G]`, values of float16 in float32: of the candidates, the first that loses least."""
    limit = 2**codec.scheme.bits - 1
    finite_TKG = torch.isfinite(x_TKGL).all(-1)
    x_TKGL = torch.where(finite_TKG[..., None], x_TKGL, 0.0).clamp(-LARGEST, LARGEST)
    low_TKG, high_TKG = x_TKGL.amin(-1), x_TKGL.amax(-1)
    middle_TKG = (low_TKG + high_TKG) / 2
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for low_share, high_share in codec.ranges_C2.unbind(0):
        low = middle_TKG + (low_TKG - middle_TKG) * low_share
        high = middle_TKG + (high_TKG - middle_TKG) * high_share
        scale, minimum = ((high - low) / limit).half().float(), low.half().float()
        if len(codec.ranges_C2) == 1:
            best = (low, scale, minimum)
            break
        code = _nearest(x_TKGL, scale[..., None], minimum[..., None], codec.scheme.bits)
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


def _nearest(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, bits: int) -> torch.Tensor:
    """Return float codes; 0 where the scale is 0 or anything is not finite. Halves go to even."""
    code = ((x - minimum) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, 2**bits - 1)
    return torch.where((scale > 0) & torch.isfinite(code), code, 0.0)


def _fit(
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
        code_TKD[..., channel] = _nearest(moved_TKD[..., channel], scale, minimum, codec.scheme.bits)
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
