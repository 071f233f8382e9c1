"""The triton kernels for packed codes against float64, for a run of pytest that `test_triton_affine.py` starts.

Under `TRITON_INTERPRET=1`, set before triton is imported, numpy runs the kernels on the processor; without it the
machine's GPU does. Memory that a kernel is to fill is full of NaN beforehand.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from support.interpreted_triton import repair_bfloat16
from support.packed_affines import affine_weight, slow_product

from optgptq.affine_weight import AffineWeight
from optgptq.kernels import triton_affine
from optgptq.kernels.device_kind import DeviceKind
from optgptq.kernels.packed_affine import PackedAffine, pack_affine
from optgptq.kernels.triton_affine import MOST_MATRIX_TOKENS, affine_matmul

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALVES = [torch.float16, torch.bfloat16]
# Rows are no multiple of a block of rows, columns no multiple of a block of columns: the last group is shorter.
ROWS, COLUMNS = 67, 296
# Tokens, bits, group size (-1: one group for a row) and whether zero points are equal.
CASES = [
    (1, 4, 128, False),
    (1, 3, 64, True),
    (2, 2, 32, False),
    (4, 8, -1, False),
    (5, 3, 96, False),
    (16, 4, -1, True),
    (17, 2, 128, True),
    (63, 3, -1, False),
    (64, 8, 64, True),
    (65, 4, 32, False),
    (65, 3, 64, False),
]


@pytest.fixture(autouse=True)
def _bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        repair_bfloat16(monkeypatch)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is never written, or read where it should not be, shows up as NaN."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *sizes, **kinds: poisoned(new_empty(*sizes, **kinds)))
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kinds: poisoned(empty(*sizes, **kinds)))


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def inputs(tokens: int, dtype: torch.dtype, *, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def on_device(x: torch.Tensor, packed: PackedAffine, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    bias = None if bias_O is None else bias_O.to(DEVICE)
    return affine_matmul(x.to(DEVICE), packed.to(DEVICE), bias_O=bias).cpu()


def error_of(output: torch.Tensor, x: torch.Tensor, weight: AffineWeight, bias_O: torch.Tensor) -> float:
    """Return the largest error beside the largest output."""
    expected = slow_product(x, weight) + bias_O.double()
    assert output.shape == expected.shape
    return float((output.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("tokens", "bits", "group_size", "symmetric"), CASES)
def test_no_worse_than_the_product_with_the_rounded_weight(tokens, bits, group_size, symmetric, dtype):
    weight = affine_weight(
        ROWS, COLUMNS, bits=bits, group_size=group_size, symmetric=symmetric, seed=tokens, shuffled=tokens % 2 == 0
    )
    x, bias_O = inputs(tokens, dtype), torch.linspace(-3, 3, ROWS).to(dtype)
    output = on_device(x, pack_affine(weight), bias_O)
    assert output.dtype == dtype
    error = error_of(output, x, weight, bias_O)
    assert error <= (2e-3 if dtype == torch.float16 else 1.6e-2)
    if tokens <= MOST_MATRIX_TOKENS:
        # Half a unit in the last place of the largest number, and sums in float32.
        assert error <= torch.finfo(dtype).eps / 2 + 1e-5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_unit_inputs_give_the_columns_of_the_weight_exactly(bits, dtype):
    weight = affine_weight(ROWS, 96, bits=bits, group_size=32, shuffled=True, negative=True)
    columns_IO = on_device(torch.eye(96, dtype=dtype)[:40], pack_affine(weight))
    assert torch.equal(columns_IO, weight.dequantize().T[:40].to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 32), (4, -1), (8, 128)])
def test_the_dense_weight_is_the_dequantized_one_to_the_bit(bits, group_size, dtype):
    weight = affine_weight(ROWS, COLUMNS, bits=bits, group_size=group_size, negative=True)
    packed = pack_affine(weight).to(DEVICE)
    assert torch.equal(triton_affine.dense(packed, dtype).cpu(), weight.dequantize(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("code", [0, 255])
def test_zero_points_and_codes_at_the_ends_of_their_range_are_exact(code, dtype):
    weight = affine_weight(3, 64, bits=8, group_size=32)
    ends_OG = torch.tensor([[0, 256], [256, 1], [255, 0]], dtype=torch.int32)
    weight = replace(weight, codes_OI=torch.full_like(weight.codes_OI, code), zero_point_OG=ends_OG)
    columns_IO = on_device(torch.eye(64, dtype=dtype), pack_affine(weight))
    assert torch.equal(columns_IO, weight.dequantize().T.to(dtype))


def test_inputs_of_zero_give_the_bias_alone():
    packed = pack_affine(affine_weight(ROWS, COLUMNS, bits=3, group_size=128))
    bias_O = torch.linspace(-1, 1, ROWS).half()
    assert torch.equal(on_device(torch.zeros(3, COLUMNS).half(), packed, bias_O), bias_O.expand(3, -1))
    assert not on_device(torch.zeros(3, COLUMNS).half(), packed).any()
    assert on_device(torch.zeros(0, COLUMNS).half(), packed).shape == (0, ROWS)


def test_other_leading_dimensions_and_a_single_row_are_kept():
    weight = affine_weight(1, 64, bits=4, group_size=32)
    x = inputs(6, torch.float16, columns=64)
    expected = slow_product(x, weight).half()
    assert torch.equal(on_device(x.view(2, 3, 64), pack_affine(weight)), expected.view(2, 3, 1))
    assert torch.equal(on_device(x[0], pack_affine(weight)), expected[0])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_do_not_depend_on_the_batch(dtype):
    """Within a class of kernels."""
    packed = pack_affine(affine_weight(ROWS, 1280, bits=2, group_size=128))
    assert triton_affine.split_plan(packed, DeviceKind(is_hip=False, wave_size=32)).num_splits == 2
    x = inputs(16, dtype, columns=1280)
    batched = on_device(x, packed)
    assert torch.equal(on_device(x[3:4], packed)[0], batched[3])
    assert torch.equal(on_device(x[5:12], packed), batched[5:12])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_batch_may_have_a_row_that_is_not_finite():
    packed = pack_affine(affine_weight(ROWS, COLUMNS, bits=4, group_size=64))
    x = inputs(3, torch.float16)
    clean = on_device(x, packed)
    x[1, 7] = torch.inf
    output = on_device(x, packed)
    assert not output[1].isfinite().any()
    assert torch.equal(output[[0, 2]], clean[[0, 2]])
