"""Sums of `x x^T` and `y x^T` of bfloat16 numbers by the processor's own instruction.

Shapes: `T` tokens, `I` input columns, `X` columns of another matrix of the same tokens.
"""

from __future__ import annotations

import torch

from optgptq.native.library import PAIR_WAYS, PairWay, check_done, load_library


def multiplies_bfloat16(values: torch.Tensor) -> bool:
    """Say whether float32 `values` are on a processor that multiplies bfloat16 numbers about twice as fast."""
    library = load_library()
    on_processor = values.dtype == torch.float32 and values.device.type == "cpu"
    return on_processor and library is not None and library.bfloat16_products


def adds_moment(inputs_TI: torch.Tensor, sum_II: torch.Tensor) -> bool:
    """Say whether `add_moment` takes these, as `adds_products` does."""
    return adds_products(inputs_TI, inputs_TI, sum_II)


def adds_products(left_TX: torch.Tensor, right_TI: torch.Tensor, sum_XI: torch.Tensor) -> bool:
    """Say whether `add_products` takes these: bfloat16 and a float32 sum on a processor with the instruction.

    Shapes that do not fit are left to torch, which says so.
    """
    tensors = (left_TX, right_TI, sum_XI)
    fits = sum_XI.shape == (*left_TX.shape[1:], *right_TI.shape[1:]) and len(left_TX) == len(right_TI)
    is_bfloat16 = left_TX.dtype == right_TI.dtype == torch.bfloat16 and sum_XI.dtype == torch.float32
    if not fits or not is_bfloat16 or any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    library = load_library()
    return library is not None and library.bfloat16_products


def add_moment(inputs_TI: torch.Tensor, sum_II: torch.Tensor, *, way: PairWay = "faster") -> None:
    """Add `X^T X` to `sum_II` in place, on and above the diagonal; below it whatever comes out may stand.

    Numbers as those of `add_products`.
    """
    _add(inputs_TI, None, sum_II, way)


def add_products(
    left_TX: torch.Tensor, right_TI: torch.Tensor, sum_XI: torch.Tensor, *, way: PairWay = "faster"
) -> None:
    """Add `left^T right` to `sum_XI` in place.

    Products of bfloat16 numbers are exact in float32 and sums are float32, 128 tokens before they are added to
    what is there. Numbers below 2^-126 may count as zero. Both ways give the same bits.
    """
    _add(left_TX, right_TI, sum_XI, way)


def _add(left_TX: torch.Tensor, right_TI: torch.Tensor | None, sum_XI: torch.Tensor, way: PairWay) -> None:
    """Add to the sum; without a right factor the left one is both."""
    library = load_library()
    assert library is not None
    left_TX = _rows(left_TX)
    factors = [left_TX.data_ptr(), left_TX.stride(0), left_TX.shape[1]]
    if right_TI is None:
        factors += [0, 0, 0]
    else:
        right_TI = _rows(right_TI)
        assert len(left_TX) == len(right_TI)
        factors += [right_TI.data_ptr(), right_TI.stride(0), right_TI.shape[1]]
    assert sum_XI.shape == (left_TX.shape[1], (left_TX if right_TI is None else right_TI).shape[1])
    assert sum_XI.stride(1) == 1
    status = library.shared.optgptq_add_bfloat16_products(
        *factors, len(left_TX), sum_XI.data_ptr(), sum_XI.stride(0), PAIR_WAYS[way], torch.get_num_threads()
    )
    check_done(status)


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with the numbers of a row side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
