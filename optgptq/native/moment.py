"""Sums of `x x^T` of bfloat16 inputs by the processor's own instruction.

Shapes: `T` tokens, `I` input columns.
"""

from __future__ import annotations

import torch

from optgptq.native.library import check_done, load_library


def adds_moment(inputs_TI: torch.Tensor, sum_II: torch.Tensor) -> bool:
    """Say whether `add_moment` takes these: bfloat16 inputs and a float32 sum on a processor with the instruction.

    Shapes that do not fit are left to torch, which says so.
    """
    fits = inputs_TI.shape[1:] == sum_II.shape[1:] and inputs_TI.device.type == sum_II.device.type == "cpu"
    if not fits or (inputs_TI.dtype, sum_II.dtype) != (torch.bfloat16, torch.float32):
        return False
    library = load_library()
    return library is not None and library.bfloat16_products


def add_moment(inputs_TI: torch.Tensor, sum_II: torch.Tensor) -> None:
    """Add `X^T X` to `sum_II` in place, on and above the diagonal; below it whatever comes out may stand.

    Products of bfloat16 numbers are exact in float32 and sums are float32, 128 tokens before they are added to
    what is there. Numbers below 2^-126 count as zero.
    """
    library = load_library()
    assert library is not None
    if inputs_TI.stride(1) != 1:
        inputs_TI = inputs_TI.contiguous()
    assert sum_II.shape == (inputs_TI.shape[1], inputs_TI.shape[1])
    assert sum_II.stride(1) == 1
    status = library.shared.optgptq_add_bfloat16_moment(
        inputs_TI.data_ptr(),
        inputs_TI.stride(0),
        *inputs_TI.shape,
        sum_II.data_ptr(),
        sum_II.stride(0),
        torch.get_num_threads(),
    )
    check_done(status)
