"""Plain torch twins of every kernel: ground truth for the others, and what runs where there is no faster one.

Shapes: `T` tokens, `O` output rows, `I` input columns, `G` groups along `I`.
"""

from __future__ import annotations

import torch

from optgptq.affine_weight import AffineWeight

# 4M weights are 16 MB in float32: small beside a model, large enough that the loop costs nothing.
_WEIGHTS_PER_CHUNK = 1 << 22


def affine_matmul(
    x: torch.Tensor,
    weight: AffineWeight,
    *,
    bias_O: torch.Tensor | None = None,
    weights_per_chunk: int = _WEIGHTS_PER_CHUNK,
) -> torch.Tensor:
    """Return `x @ weight.T + bias`, dequantizing a few rows of the weight at a time.

    Args:
        x: `[..., I]`, any float dtype; the weight is cast to it after dequantization in float32.
        weight: codes, scales and zero points of the linear, on the device of `x`.
        bias_O: `[O]` or None.
        weights_per_chunk: dequantized weights held at once; tests lower it.

    Returns:
        `[..., O]` in the dtype of `x`.
    """
    if weight.out_features * weight.in_features <= weights_per_chunk:
        return torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias_O)
    rows = max(weights_per_chunk // weight.in_features, 1)
    output = x.new_empty((*x.shape[:-1], weight.out_features))
    for begin in range(0, weight.out_features, rows):
        end = min(begin + rows, weight.out_features)
        chunk_bias = None if bias_O is None else bias_O[begin:end]
        part = torch.nn.functional.linear(x, weight.rows(begin, end).dequantize(x.dtype), chunk_bias)
        output[..., begin:end] = part
    return output
