"""What is stored is what the solver had: codes, coefficients and units of every kind of storage."""

from __future__ import annotations

import pytest
import torch
from support.binary_weights import slow_dense

from optgptq.solvers.binary_store import nearest_levels, plane_weight, shape_weight
from optgptq.solvers.levels import half_precision, levels_of, shape_table, sign_table

SIZES = [(5, 96, 32), (3, 21, 7), (4, 30, 30)]


def random_codes(num_rows: int, num_columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, (num_rows, num_columns), generator=generator, dtype=torch.uint8)


def random_coefficients(num_groups: int, num_coefficients: int, num_rows: int) -> torch.Tensor:
    """Values that float16 holds, of both signs and in no order; the very first is negative."""
    generator = torch.Generator().manual_seed(num_groups)
    coefficient_GBO = half_precision(torch.randn(num_groups, num_coefficients, num_rows, generator=generator))
    coefficient_GBO[0, 0, 0] = -coefficient_GBO[0, 0, 0].abs()
    return coefficient_GBO


def dense(
    codes_OI: torch.Tensor, table_KBO: torch.Tensor, coefficient_GBO: torch.Tensor, group_size: int
) -> torch.Tensor:
    groups = zip(codes_OI.split(group_size, dim=1), coefficient_GBO.double(), strict=True)
    levels = [levels_of(table_KBO.double(), values).gather(0, codes.T.long()).T for codes, values in groups]
    return torch.cat(levels, dim=1)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize(("num_rows", "num_columns", "group_size"), SIZES)
def test_planes_in_float16(num_rows: int, num_columns: int, group_size: int, bits: int) -> None:
    codes_OI = random_codes(num_rows, num_columns, bits)
    coefficient_GBO = random_coefficients(num_columns // group_size, bits + 1, num_rows)
    weight = plane_weight(codes_OI, coefficient_GBO, None, group_size=group_size)
    expected_OI = dense(codes_OI, sign_table(bits, coefficient_GBO), coefficient_GBO, group_size)
    torch.testing.assert_close(slow_dense(weight), expected_OI, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.dequantize(), expected_OI.float(), rtol=1e-5, atol=1e-6)
    assert weight.coefficients.storage == "float"
    assert {tensor.dtype for tensor in weight.coefficients.tensors()} == {torch.float16}
    alpha_OGP, _ = weight.coefficients.values()
    assert bool((alpha_OGP >= 0).all())
    assert bool((alpha_OGP.diff(dim=2) <= 0).all())
    assert list(weight.problems()) == []


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize(("num_rows", "num_columns", "group_size"), SIZES)
@pytest.mark.parametrize("size", [1.0, 2.0**-24])
def test_planes_in_bytes(num_rows: int, num_columns: int, group_size: int, bits: int, size: float) -> None:
    codes_OI, num_groups = random_codes(num_rows, num_columns, bits), num_columns // group_size
    generator = torch.Generator().manual_seed(0)
    bytes_GBO = torch.randint(-127, 128, (num_groups, bits + 1, num_rows), generator=generator)
    unit_O = half_precision(size * (torch.rand(num_rows, generator=generator) + 0.5))
    coefficient_GBO = bytes_GBO * unit_O
    weight = plane_weight(codes_OI, coefficient_GBO, unit_O, group_size=group_size)
    expected_OI = dense(codes_OI, sign_table(bits, unit_O), coefficient_GBO, group_size)
    torch.testing.assert_close(slow_dense(weight), expected_OI, rtol=1e-12, atol=1e-12)
    alpha_OGP, offset_OG, row_scale_O = weight.coefficients.tensors()
    assert (alpha_OGP.dtype, offset_OG.dtype, row_scale_O.dtype) == (torch.int8, torch.int8, torch.float16)
    assert torch.equal(alpha_OGP.long(), bytes_GBO[:, :-1].abs().permute(2, 0, 1).sort(dim=2, descending=True).values)
    assert torch.equal(offset_OG.long(), bytes_GBO[:, -1].T)
    assert torch.equal(row_scale_O.float(), unit_O)
    assert list(weight.problems()) == []


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize(("num_rows", "num_columns", "group_size"), SIZES)
def test_shapes_of_rows(num_rows: int, num_columns: int, group_size: int, bits: int) -> None:
    codes_OI = random_codes(num_rows, num_columns, bits)
    coefficient_GBO = random_coefficients(num_columns // group_size, 2, num_rows)
    generator = torch.Generator().manual_seed(bits)
    steps_OP = torch.randint(1, 64, (num_rows, bits), generator=generator).sort(dim=1, descending=True).values
    weight = shape_weight(codes_OI, coefficient_GBO, steps_OP, group_size=group_size)
    expected_OI = dense(codes_OI, shape_table(steps_OP.T.float()), coefficient_GBO, group_size)
    torch.testing.assert_close(slow_dense(weight), expected_OI, rtol=1e-12, atol=1e-12)
    stored_OP, scale_OG, offset_OG = weight.coefficients.tensors()
    assert (stored_OP.dtype, scale_OG.dtype, offset_OG.dtype) == (torch.uint8, torch.float16, torch.float16)
    assert torch.equal(stored_OP.long(), steps_OP)
    assert bool((scale_OG >= 0).all())
    assert list(weight.problems()) == []


def test_nearest_levels_of_every_group() -> None:
    codes_OI, coefficient_GBO = random_codes(4, 30, 2), random_coefficients(3, 3, 4)
    weight = plane_weight(codes_OI, coefficient_GBO, None, group_size=10)
    dense_OI = 2 * torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    level_OIK = weight.levels().repeat_interleave(10, dim=1)
    index_OI1 = (dense_OI[:, :, None] - level_OIK).abs().argmin(dim=2, keepdim=True)
    assert torch.equal(nearest_levels(weight, dense_OI), level_OIK.gather(2, index_OI1)[:, :, 0])
