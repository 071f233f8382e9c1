"""Levels of binary codes, and fitting their coefficients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.slow_binary import slow_columns, slow_fit, slow_levels

from optgptq.solvers.levels import (
    best_change,
    columns_of,
    half_precision,
    levels_of,
    nearest_level,
    shape_table,
    sign_table,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_codes(num_columns: int, num_rows: int, bits: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (num_columns, num_rows), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_signed_sums(bits: int) -> None:
    coefficient_BO = random(bits + 1, 5)
    level_KO = levels_of(sign_table(bits, coefficient_BO), coefficient_BO)
    for row in range(5):
        torch.testing.assert_close(level_KO[:, row], slow_levels(coefficient_BO[:, row]), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("bits", [2, 3])
def test_levels_of_a_shape_are_those_of_its_planes(bits: int) -> None:
    steps_PO = torch.randint(1, 16, (bits, 4), generator=torch.Generator().manual_seed(bits)).double()
    coefficient_BO = random(2, 4)
    level_KO = levels_of(shape_table(steps_PO), coefficient_BO)
    for row in range(4):
        planes_P = steps_PO[:, row] * coefficient_BO[0, row] / 2
        expected_K = slow_levels(torch.cat([planes_P, coefficient_BO[1:, row]]))
        torch.testing.assert_close(level_KO[:, row], expected_K, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("bits", [2, 3])
def test_columns_of_codes_give_their_levels(bits: int) -> None:
    codes_LO, coefficient_BO = random_codes(13, 6, bits), random(bits + 1, 6)
    table_KBO = sign_table(bits, coefficient_BO)
    columns_BLO = columns_of(table_KBO, codes_LO)
    level_LO = levels_of(table_KBO, coefficient_BO).gather(0, codes_LO.long())
    torch.testing.assert_close(torch.einsum("blo,bo->lo", columns_BLO, coefficient_BO), level_LO)
    for row in range(6):
        assert torch.equal(columns_BLO[:, :, row].T, slow_columns(codes_LO[:, row], bits))
    shaped_KBO = shape_table(torch.tensor([[3.0, 5.0], [1.0, 2.0]], dtype=torch.float64))
    shaped_BLO = columns_of(shaped_KBO, random_codes(13, 2, 2))
    assert torch.equal(shaped_BLO[1], torch.ones(13, 2, dtype=torch.float64))
    assert sorted(shaped_BLO[0, :, 1].unique().tolist()) == [-3.5, -1.5, 1.5, 3.5]


def test_the_nearest_level_and_of_two_the_smaller_code() -> None:
    level_KR = torch.tensor([[3.0, 0.0], [-1.0, 2.0], [1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    values = [(-9.0, 1), (0.0, 1), (0.1, 2), (2.0, 0), (2.5, 0), (99.0, 0)]
    for value, code in values:
        level_R, code_R = nearest_level(torch.tensor([value, value]).double(), level_KR)
        assert (int(code_R[0]), float(level_R[0])) == (code, float(level_KR[code, 0]))
        assert code_R.dtype == torch.uint8
    value_R, level_KR = random(500), random(8, 500, seed=1)
    level_R, code_R = nearest_level(value_R, level_KR)
    assert torch.equal(code_R.long(), (value_R - level_KR).abs().argmin(dim=0))
    assert torch.equal(level_R, level_KR.gather(0, code_R.long()[None])[0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(1, 4), num_columns=st.integers(1, 24), num_rows=st.integers(1, 5))
def test_a_change_never_raises_the_loss_and_ends_its_gradient(
    seed: int, bits: int, num_columns: int, num_rows: int
) -> None:
    codes_LO = random_codes(num_columns, num_rows, bits, seed=seed)
    root_LL, error_LO = random(num_columns, num_columns, seed=seed), random(num_columns, num_rows, seed=seed + 1)
    columns_BLO = columns_of(sign_table(bits, error_LO), codes_LO)
    whitened_BLO = root_LL @ columns_BLO
    normal_BBO = torch.einsum("alo,blo->abo", whitened_BLO, whitened_BLO)
    slope_BO = torch.einsum("blo,lo->bo", whitened_BLO, root_LL @ error_LO)
    before = normal_BBO.clone(), slope_BO.clone()
    change_BO = best_change(normal_BBO, slope_BO)
    assert torch.equal(normal_BBO, before[0])
    assert torch.equal(slope_BO, before[1])
    rest_LO = root_LL @ (error_LO - torch.einsum("blo,bo->lo", columns_BLO, change_BO))
    old_O, new_O = (root_LL @ error_LO).square().sum(dim=0), rest_LO.square().sum(dim=0)
    assert bool((new_O <= old_O * (1 + 1e-10) + 1e-12).all())
    for row in range(num_rows):
        normal_BB = normal_BBO[:, :, row]
        scaled_BB = normal_BB / normal_BB.diagonal().sqrt() / normal_BB.diagonal().sqrt()[:, None]
        if float(torch.linalg.eigvalsh(scaled_BB)[0]) < 1e-3:
            continue
        gradient_B = whitened_BLO[:, :, row] @ rest_LO[:, row]
        assert float(gradient_B.abs().max()) <= 1e-9 * float(slope_BO[:, row].abs().max())
        fitted_B = slow_fit(error_LO[:, row], slow_columns(codes_LO[:, row], bits), root_LL.T @ root_LL)
        torch.testing.assert_close(change_BO[:, row], fitted_B, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_others_explain_stays_as_it_is(dtype: torch.dtype) -> None:
    """Codes of one kind only, equal planes, and a moment of zeros: some directions say nothing."""
    codes_LO = torch.tensor([[0, 0, 1], [0, 3, 1], [0, 3, 2], [0, 0, 1]], dtype=torch.uint8)
    columns_BLO = columns_of(sign_table(2, torch.ones(1, dtype=dtype)), codes_LO)
    target_LO = torch.tensor([[2.0, 1.0, 1.0], [2.0, 5.0, 1.0], [2.0, 5.0, 7.0], [2.0, 1.0, 1.0]], dtype=dtype)
    normal_BBO = torch.einsum("alo,blo->abo", columns_BLO, columns_BLO)
    slope_BO = torch.einsum("blo,lo->bo", columns_BLO, target_LO)
    change_BO = best_change(normal_BBO, slope_BO)
    torch.testing.assert_close(torch.einsum("blo,bo->lo", columns_BLO, change_BO), target_LO, rtol=1e-5, atol=1e-5)
    # One direction is left in the first row, two in the others; the first planes take it.
    assert int((change_BO[:, 0] != 0).sum()) == 1
    assert int((change_BO[:, 1] != 0).sum()) == 2
    nothing_BO = best_change(torch.zeros_like(normal_BBO), torch.zeros_like(slope_BO))
    assert torch.equal(nothing_BO, torch.zeros_like(slope_BO))


def test_half_precision_clamps_and_keeps_the_dtype() -> None:
    values = torch.tensor([1e6, -1e6, 65519.0, 0.1, 2.0**-24, 1e-9, 0.0], dtype=torch.float64)
    halved = half_precision(values)
    assert halved.dtype == torch.float64
    assert halved.tolist() == [65504.0, -65504.0, 65504.0, float(torch.tensor(0.1).half()), 2.0**-24, 0.0, 0.0]
    assert torch.equal(half_precision(halved), halved)
