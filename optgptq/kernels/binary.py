"""Products with sign planes in plain torch: the literal formula, and what runs where there is no faster kernel.

Shapes: `T` tokens, `O` output rows, `I` input columns, `G` groups along `I`, `L` columns of one group, `P` planes, `W`
32-bit words.
"""

from __future__ import annotations

import torch

from optgptq.kernels.packed_binary import COLUMNS_PER_WORD, PackedBinary, arrange_inputs

# 256K weights are 2 MB with their signs in float32: they stay in a processor's cache between the passes.
_WEIGHTS_PER_CHUNK = 1 << 18


def binary_matmul(
    x: torch.Tensor,
    weight: PackedBinary,
    *,
    bias_O: torch.Tensor | None = None,
    weights_per_chunk: int = _WEIGHTS_PER_CHUNK,
) -> torch.Tensor:
    """Return `x @ weight.T + bias`, unpacking a few rows of the weight at a time.

    Args:
        x: `[..., I]`, any float dtype; products and sums are taken in float32, or in float64 for inputs of float64.
        weight: on the device of `x`.
        bias_O: `[O]` or None.
        weights_per_chunk: dense weights held at once, but never less than a row; tests lower it.

    Returns:
        `[..., O]` in the dtype of `x`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    num_words = weight.planes_WPO.shape[0]
    inputs = arrange_inputs(weight.ordered(x).to(dtype), num_words)
    bias = None if bias_O is None else bias_O.to(dtype)
    signs_of_byte = _signs_of_every_byte(x.device)
    rows = max(weights_per_chunk // (num_words * COLUMNS_PER_WORD), 1)
    output = x.new_empty((*x.shape[:-1], weight.out_features))
    for begin in range(0, weight.out_features, rows):
        end = min(begin + rows, weight.out_features)
        chunk_bias = None if bias is None else bias[begin:end]
        # No name for the dense rows: they would live on while the next ones are made.
        output[..., begin:end] = torch.nn.functional.linear(
            inputs, _dense_rows(weight, begin, end, signs_of_byte).to(dtype), chunk_bias
        )
    return output


def binary_matmul_literal(
    x: torch.Tensor, weight: PackedBinary, *, bias_O: torch.Tensor | None = None, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Return `x @ weight.T + bias` by the formula, in `dtype`: ground truth for the other implementations.

    With the sums `X_G` of a group's inputs and `S_GP` of its inputs times the signs of plane `P`, an output is
    `sum_G (offset_G X_G + sum_P alpha_GP S_GP)`. All signs are held at once.

    Args:
        x: `[..., I]`.
        weight: on the device of `x`.
        bias_O: `[O]` or None.
        dtype: float32 or float64, of products, sums and the result.

    Returns:
        `[..., O]` in `dtype`.
    """
    num_words, num_planes, rows = weight.planes_WPO.shape
    positions = torch.arange(COLUMNS_PER_WORD, device=x.device)
    bits = weight.planes_WPO[..., None] >> positions & 1
    signs_POGL = (2 * bits - 1).permute(1, 2, 0, 3).reshape(num_planes, rows, weight.num_groups, -1).to(dtype)
    inputs_TGL = arrange_inputs(weight.ordered(x).to(dtype), num_words).reshape(-1, *signs_POGL.shape[2:])
    sums_TPOG = torch.einsum("tgl,pogl->tpog", inputs_TGL, signs_POGL)
    output_TO = torch.einsum("tpog,gpo->to", sums_TPOG, weight.alpha_GPO.to(dtype))
    output_TO += inputs_TGL.sum(2) @ weight.offset_GO.to(dtype)
    if bias_O is not None:
        output_TO += bias_O.to(dtype)
    return output_TO.reshape(*x.shape[:-1], rows)


def _dense_rows(weight: PackedBinary, begin: int, end: int, signs_of_byte: torch.Tensor) -> torch.Tensor:
    """Return rows `begin .. end` in float32, columns in the order of `arrange_inputs`.

    Sums in the order of `BinaryWeight.levels`, so that every number is the same to the bit.
    """
    words_POW = weight.planes_WPO[:, :, begin:end].permute(1, 2, 0).contiguous()
    bytes_by_plane = words_POW.view(torch.uint8).reshape(weight.bits, -1).to(torch.int32)
    alpha_GPO = weight.alpha_GPO[:, :, begin:end].to(torch.float32)
    offset_OG1 = weight.offset_GO[:, begin:end].t().to(torch.float32)[:, :, None]
    dense_OGL = offset_OG1.repeat(1, 1, weight.group_words * COLUMNS_PER_WORD)
    for plane in range(weight.bits):
        alpha_OG1 = alpha_GPO[:, plane].t()[:, :, None]
        dense_OGL.addcmul_(alpha_OG1, signs_of_byte.index_select(0, bytes_by_plane[plane]).view(dense_OGL.shape))
    return dense_OGL.view(end - begin, -1)


def _signs_of_every_byte(device: torch.device) -> torch.Tensor:
    """Return float32 `[256, 8]`: +1 where a bit of a byte is set, -1 elsewhere, from the lowest bit up."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(torch.float32)
