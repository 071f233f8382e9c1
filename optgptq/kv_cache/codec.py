"""From vectors to codes and back: the definition that every kernel is compared with, in torch.

All of it in float32. A group of numbers gets a scale `s` and a minimum `m`, both rounded to float16 before any code is
chosen; a code `c` stands for `s * c + m`. Formulas: `docs/math/kv-cache-codes.md`.

Shapes: `T` tokens, `K` key/value heads, `D` head dimension, `G` groups of a head, `L` numbers of a group, `C` candidate
ranges. A codec for groups along tokens (`axis` `token`) reads whole groups of tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.kv_cache.fitting import error_feedback, fit_codes
from optgptq.kv_cache.rounding import LARGEST, choose_range, nearest
from optgptq.kv_cache.scheme import SideScheme
from optgptq.kv_cache.setup import SideParameters


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SideCodec:
    """How vectors of one side of one decoder layer become codes.

    Attributes:
        scheme: bits and groups; not exact.
        ranges_C2: float32 shares; see `SideParameters`. At least one row.
        metric_KDD: float32; None: each number is rounded to the nearest.
        feedback_KDD: float32, made from the metric: an error `e` of channel `d` adds `e * feedback[d, d']` to each
            later channel `d'`; zero on and below the diagonal. None where the metric is.
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


def encode(x_TKD: torch.Tensor, codec: SideCodec) -> Codes:
    """Return codes of float32 vectors.

    A group with a number that is not finite gets minimum NaN and codes 0: it is seen in every result. Numbers beyond
    float16 count as its largest.
    """
    x_TKD = x_TKD.float()
    x_TKD = torch.where(x_TKD.isfinite(), x_TKD.clamp(-LARGEST, LARGEST), x_TKD)
    if codec.scheme.axis == "token":
        return _encode_along_tokens(x_TKD, codec)
    num_tokens, num_kv_heads = x_TKD.shape[:2]
    x_TKGL = x_TKD.reshape(num_tokens, num_kv_heads, -1, codec.scheme.group_size)
    weight_KGL = None
    if codec.metric_KDD is not None:
        weight_KGL = codec.metric_KDD.diagonal(dim1=1, dim2=2).reshape(x_TKGL.shape[1:])
    scale_TKG, minimum_TKG = choose_range(x_TKGL, weight_KGL, codec.ranges_C2, codec.scheme.bits)
    if codec.metric_KDD is None:
        code_TKD = nearest(x_TKGL, scale_TKG[..., None], minimum_TKG[..., None], codec.scheme.bits).flatten(2)
    else:
        code_TKD, scale_TKG, minimum_TKG = fit_codes(x_TKD, scale_TKG, minimum_TKG, codec)
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
    scale, minimum = choose_range(x_TKDL, None, codec.ranges_C2, codec.scheme.bits)
    code = nearest(x_TKDL, scale[..., None], minimum[..., None], codec.scheme.bits)
    code_TKD = code.permute(0, 3, 1, 2).reshape(x_TKD.shape)
    return Codes(code_TKD=code_TKD.to(torch.uint8), scale_TKG=scale.half(), minimum_TKG=minimum.half())
