"""What parameters of a quantized KV cache must be: shapes before they are read, values after.

Shapes: `K` key/value heads, `D` head dimension, `C` candidate ranges.
"""

from __future__ import annotations

import torch

from optgptq.checkpoint.safetensors_header import TensorInfo
from optgptq.errors import FormatError
from optgptq.kv_cache.rotary_pairs import RotaryPairs, untied_pair

MAX_RANGES = 64
_DTYPE = "F32"
# Largest entry of `R^T R - I`.
_ORTHOGONAL = 1e-4
# Of a metric, over its largest entry: how far it may be from symmetric. Over its mean diagonal: how far below zero.
_SYMMETRIC = 1e-4
_SEMIDEFINITE = 1e-3
_ACTION = "Calibrate the cache again, or pass --kv-cache 4 for a cache that needs no parameters."


def check_shape(ending: str, info: TensorInfo, where: str, *, num_kv_heads: int, head_dim: int) -> None:
    """Raise FormatError unless the tensor of that name is float32 and as large as the model's heads say."""
    square = [num_kv_heads, head_dim, head_dim]
    allowed = {
        "shift": [[num_kv_heads, head_dim]],
        "smooth": [[num_kv_heads, head_dim]],
        "rotation": [square, square[1:]],
        "metric": [square],
    }
    shape = list(info.shape)
    if ending == "ranges":
        expected = f"{_DTYPE} [C, 2] with C from 1 to {MAX_RANGES}"
        is_sound = len(shape) == 2 and 1 <= shape[0] <= MAX_RANGES and shape[1] == 2
    else:
        expected = f"{_DTYPE} " + " or ".join(str(shape) for shape in allowed[ending])
        is_sound = shape in allowed[ending]
    if info.dtype != _DTYPE or not is_sound:
        raise FormatError(where, expected=expected, found=f"{info.dtype} {shape}", action=_ACTION)


def check_values(ending: str, tensor: torch.Tensor, where: str, *, pairs: RotaryPairs | None) -> None:
    """Raise FormatError unless the values can be used; `pairs`: channels whose scales must be the same."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise FormatError(where, expected="finite values", found=f"{bad} NaN or infinite", action=_ACTION)
    if ending == "smooth":
        _check_scale(tensor, where, pairs)
    elif ending == "rotation":
        identity = torch.eye(tensor.shape[-1], dtype=torch.float64)
        deviation = float((tensor.double().mT @ tensor.double() - identity).abs().max())
        if not deviation < _ORTHOGONAL:
            raise FormatError(
                where,
                expected=f"an orthogonal matrix, R^T R within {_ORTHOGONAL:g} of the identity",
                found=f"{deviation:.3g}",
                action=_ACTION,
            )
    elif ending == "metric":
        _check_metric(tensor, where)
    elif ending == "ranges" and not bool(((tensor > 0) & (tensor <= 1)).all()):
        found = f"{float(tensor.min()):g} to {float(tensor.max()):g}"
        raise FormatError(where, expected="shares above 0 and at most 1", found=found, action=_ACTION)


def _check_scale(scale_KD: torch.Tensor, where: str, pairs: RotaryPairs | None) -> None:
    if not bool((scale_KD > 0).all()):
        raise FormatError(where, expected="scales above 0", found=f"{float(scale_KD.min()):g}", action=_ACTION)
    untied = None if pairs is None else untied_pair(scale_KD, pairs)
    if untied is not None:
        head, channel, partner = untied
        raise FormatError(
            where,
            expected="one scale for both channels of a rotary pair",
            found=f"{float(scale_KD[head, channel]):g} and {float(scale_KD[head, partner]):g} "
            f"for channels {channel} and {partner} of head {head}",
            action=_ACTION,
        )


def _check_metric(metric_KDD: torch.Tensor, where: str) -> None:
    metric = metric_KDD.double()
    skew, largest = float((metric - metric.mT).abs().max()), float(metric.abs().max())
    if skew > _SYMMETRIC * largest:
        raise FormatError(
            where, expected="a symmetric matrix", found=f"entries that differ by {skew:.3g}", action=_ACTION
        )
    # A head that nothing reads has a metric of zeros.
    mean_K = metric.diagonal(dim1=1, dim2=2).mean(1)
    shift_K = torch.where(mean_K > 0, _SEMIDEFINITE * mean_K, torch.ones_like(mean_K))
    identity = torch.eye(metric.shape[1], dtype=torch.float64)
    failed_K = torch.linalg.cholesky_ex(metric + shift_K[:, None, None] * identity).info
    if bool(failed_K.any()):
        raise FormatError(
            where,
            expected="a positive semidefinite matrix",
            found=f"one of head {int(failed_K.nonzero()[0])} that is not",
            action=_ACTION,
        )
