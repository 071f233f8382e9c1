"""The triton kernel against float64, for a run of pytest of its own: `test_triton_binary.py` starts it.

Under `TRITON_INTERPRET=1`, set before triton is imported, numpy runs the kernels on the processor; without it the
machine's GPU does.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.interpreted_triton import repair_bfloat16
from support.packed_binaries import binary_weight

from optgptq.kernels import triton_binary
from optgptq.kernels.binary import binary_matmul, binary_matmul_literal
from optgptq.kernels.triton_binary import DENSE_FROM_TOKENS, split_plan
from optgptq.runtime.linear import pack_binary

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALVES = [torch.float16, torch.bfloat16]
# Rows are no multiple of a block, columns no multiple of a word: the last group is shorter.
ROWS, COLUMNS = 67, 520
# Tokens, bits and group size (-1: one group for a row): every one of each at least once.
CASES = [
    (1, 1, 32),
    (1, 3, 128),
    (2, 2, 64),
    (3, 4, 256),
    (4, 3, -1),
    (7, 2, 32),
    (8, 1, 128),
    (16, 4, 64),
    (17, 3, 96),
    (63, 2, 128),
    (64, 3, 128),
    (513, 2, -1),
]


@pytest.fixture(autouse=True)
def _bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        repair_bfloat16(monkeypatch)


def inputs(tokens: int, dtype: torch.dtype, *, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def on_device(x: torch.Tensor, packed: Any, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    bias = None if bias_O is None else bias_O.to(DEVICE)
    return triton_binary.binary_matmul(x.to(DEVICE), packed.to(DEVICE), bias_O=bias).cpu()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("tokens", "bits", "group_size"), CASES)
def test_no_worse_than_the_product_with_the_rounded_weight(tokens, bits, group_size, dtype):
    weight = binary_weight(ROWS, COLUMNS, bits=bits, group_size=group_size, seed=tokens, shuffled=tokens % 2 == 0)
    x, bias_O = inputs(tokens, dtype), torch.linspace(-3, 3, ROWS).to(dtype)
    packed = pack_binary(weight)
    expected = binary_matmul_literal(x, packed, bias_O=bias_O)
    output = on_device(x, packed, bias_O)
    assert output.dtype == dtype
    assert output.shape == (tokens, ROWS)
    rounded = torch.nn.functional.linear(x.double(), weight.dequantize(dtype).double(), bias_O.double()).to(dtype)
    largest = expected.abs().max()
    error, error_of_rounded = ((result.double() - expected).abs().max() / largest for result in (output, rounded))
    assert error <= (2e-3 if dtype == torch.float16 else 1.6e-2)
    if tokens < DENSE_FROM_TOKENS:
        # Beside the rounding of the result itself, half a unit in the last place of the largest number.
        assert error <= max(error_of_rounded, torch.finfo(dtype).eps / 2 + 1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_signs_are_exact_and_sums_are_float32(dtype):
    """Rounded only at the end: float32 on the processor rounds to the same number, but where it lies between two."""
    packed = pack_binary(binary_weight(ROWS, COLUMNS, bits=3, group_size=64))
    x = inputs(5, dtype)
    output, other = on_device(x, packed), binary_matmul(x, packed)
    assert torch.allclose(output.double(), other.double(), rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert (output == other).float().mean() > 0.98


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_unit_inputs_give_the_columns_of_the_weight_exactly(bits, dtype):
    weight = binary_weight(ROWS, 96, bits=bits, group_size=32, shuffled=True)
    packed = pack_binary(weight)
    columns_IO = on_device(torch.eye(96, dtype=dtype)[:40], packed)
    assert torch.equal(columns_IO, binary_matmul_literal(torch.eye(96)[:40], packed).to(dtype))


def test_inputs_of_zero_give_the_bias_alone():
    packed = pack_binary(binary_weight(ROWS, COLUMNS, bits=2, group_size=128))
    bias_O = torch.linspace(-1, 1, ROWS).half()
    assert torch.equal(on_device(torch.zeros(3, COLUMNS).half(), packed, bias_O), bias_O.expand(3, -1))
    assert not on_device(torch.zeros(3, COLUMNS).half(), packed).any()
    assert on_device(torch.zeros(0, COLUMNS).half(), packed).shape == (0, ROWS)


def test_signs_that_cancel_leave_the_offset():
    weight = binary_weight(ROWS, 256, bits=2, group_size=64)
    alternating_I = torch.arange(256) % 2 * 3
    weight = replace(weight, codes_OI=alternating_I.to(torch.uint8).expand(ROWS, -1).contiguous())
    packed = pack_binary(weight)
    sums_GO = packed.offset_GO.float().sum(0) * 64
    output = on_device(torch.ones(1, 256).half(), packed)
    assert torch.allclose(output[0].float(), sums_GO, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_runs_are_equal_to_the_bit_and_rows_do_not_depend_on_the_batch(dtype):
    packed = pack_binary(binary_weight(ROWS, COLUMNS, bits=3, group_size=32))
    assert split_plan(packed).num_splits > 1
    x = inputs(18, dtype)
    batched = on_device(x, packed)
    assert torch.equal(on_device(x, packed), batched)
    for row in (0, 17):
        assert torch.equal(on_device(x[row : row + 1], packed)[0], batched[row])


def test_leading_dimensions_and_strides_of_inputs():
    packed = pack_binary(binary_weight(5, 64, bits=2, group_size=32))
    x = inputs(6, torch.float16, columns=64)
    flat = on_device(x, packed)
    assert torch.equal(on_device(x.view(2, 3, 64), packed), flat.view(2, 3, 5))
    assert torch.equal(on_device(x.T.contiguous().T, packed), flat)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_the_dense_weight_is_that_of_the_definition(dtype):
    weight = binary_weight(ROWS, COLUMNS, bits=3, group_size=128)
    dense_OI = triton_binary.dense(pack_binary(weight).to(DEVICE), dtype).cpu()
    assert torch.equal(dense_OI, weight.dequantize(dtype))


def test_a_short_weight_is_not_split_and_a_long_one_is():
    assert split_plan(pack_binary(binary_weight(8, 64, bits=1, group_size=32))).num_splits == 1
    plan = split_plan(pack_binary(binary_weight(64, 4096, bits=1, group_size=128)))
    assert (plan.num_steps, plan.num_splits, plan.steps_per_split) == (32, 8, 4)
    odd = split_plan(pack_binary(binary_weight(64, 32 * 9, bits=1, group_size=32)))
    assert (odd.num_steps, odd.num_splits, odd.steps_per_split) == (9, 2, 5)
