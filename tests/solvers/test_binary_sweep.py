"""Sweeps over the groups: no step raises the loss, and many lead to the fit of all coefficients at once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import random_moment, random_weight
from support.slow_binary import row_losses, slow_columns, slow_fit, slow_joint_columns, slow_levels

from optgptq.solvers.binary_sweep import BinaryRows, ImprovedGroup, byte_units, improve_group, sweep
from optgptq.solvers.levels import best_change, columns_of, half_precision, levels_of, shape_table, sign_table


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Rows with random codes and coefficients."""

    weight_IO: torch.Tensor
    moment_II: torch.Tensor
    table_KBO: torch.Tensor
    group_size: int
    rows: BinaryRows

    def level(self) -> torch.Tensor:
        groups = zip(self.rows.codes_IO.split(self.group_size), self.rows.coefficient_GBO, strict=True)
        return torch.cat([levels_of(self.table_KBO, values).gather(0, codes.long()) for codes, values in groups])

    def losses(self) -> torch.Tensor:
        return row_losses(self.rows.error_IO, self.moment_II)

    def improved(self, group: int, unit_O: torch.Tensor | None = None) -> ImprovedGroup:
        columns = slice(group * self.group_size, (group + 1) * self.group_size)
        return improve_group(
            self.moment_II[columns] @ self.rows.error_IO,
            self.moment_II[columns, columns],
            self.rows.codes_IO[columns],
            self.rows.coefficient_GBO[group],
            self.table_KBO,
            unit_O=unit_O,
            forced=False,
        )


def random_case(
    num_columns: int,
    num_rows: int,
    *,
    bits: int = 2,
    group_size: int,
    seed: int = 0,
    num_tokens: int | None = None,
    shaped: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    weight_IO = random_weight(num_rows, num_columns, seed=seed).T.to(dtype)
    moment_II = random_moment(num_columns, seed=seed, num_tokens=num_tokens).to(dtype)
    table_KBO = sign_table(bits, weight_IO)
    if shaped:
        table_KBO = shape_table(torch.randint(1, 12, (bits, num_rows), generator=generator).to(dtype))
    shape = (num_columns // group_size, table_KBO.shape[1], num_rows)
    coefficient_GBO = half_precision(torch.randn(shape, generator=generator, dtype=dtype))
    codes_IO = torch.randint(0, 2**bits, (num_columns, num_rows), generator=generator, dtype=torch.uint8)
    case = Case(weight_IO, moment_II, table_KBO, group_size, BinaryRows(codes_IO, coefficient_GBO, weight_IO))
    case.rows.error_IO = weight_IO - case.level()
    return case


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(1, 3),
    group_size=st.integers(1, 17),
    num_groups=st.integers(1, 3),
    num_tokens=st.sampled_from([None, 1, 3]),
    shaped=st.booleans(),
    in_bytes=st.booleans(),
)
def test_no_step_raises_the_loss(
    seed: int, bits: int, group_size: int, num_groups: int, num_tokens: int | None, shaped: bool, in_bytes: bool
) -> None:
    case = random_case(
        num_groups * group_size,
        3,
        bits=bits,
        group_size=group_size,
        seed=seed,
        num_tokens=num_tokens,
        shaped=shaped,
    )
    for _ in range(2):
        for group in range(num_groups):
            unit_O = byte_units(case.rows.coefficient_GBO) if in_bytes else None
            columns = slice(group * group_size, (group + 1) * group_size)
            before_O, scale_O = case.losses(), row_losses(case.weight_IO, case.moment_II)
            improved = case.improved(group, unit_O)
            case.rows.codes_IO[columns] = improved.codes_LO
            case.rows.coefficient_GBO[group] = improved.coefficient_BO
            case.rows.error_IO[columns] -= improved.change_LO
            torch.testing.assert_close(case.rows.error_IO, case.weight_IO - case.level(), rtol=0, atol=1e-9)
            assert bool((case.losses() <= before_O * (1 + 1e-9) + 1e-12 * scale_O).all())


@pytest.mark.parametrize("bits", [2, 3])
def test_a_group_is_fitted_and_then_descended_column_by_column(bits: int) -> None:
    """The literal form: dense least squares, then every level of every column is tried."""
    case = random_case(36, 6, bits=bits, group_size=12, seed=bits)
    columns = slice(12, 24)
    improved = case.improved(1)
    for row in range(6):
        error_I = case.rows.error_IO[:, row].clone()
        codes_L, old_B = case.rows.codes_IO[columns, row].clone(), case.rows.coefficient_GBO[1][:, row]
        columns_LB = slow_columns(codes_L, bits)
        moment_LL = case.moment_II[columns, columns]
        others_L = torch.linalg.solve(moment_LL, (case.moment_II @ error_I)[columns])
        fitted_B = half_precision(old_B + slow_fit(others_L, columns_LB, moment_LL))
        assert torch.equal(improved.coefficient_BO[:, row], fitted_B)
        level_K = slow_levels(fitted_B)
        error_I[columns] -= level_K[codes_L.long()] - slow_levels(old_B)[codes_L.long()]
        for column in range(12):
            losses = []
            for level in level_K:
                tried_I = error_I.clone()
                tried_I[12 + column] += level_K[int(codes_L[column])] - level
                losses.append(float(tried_I @ case.moment_II @ tried_I))
            best = min(range(len(losses)), key=losses.__getitem__)
            error_I[12 + column] += level_K[int(codes_L[column])] - level_K[best]
            codes_L[column] = best
        assert torch.equal(improved.codes_LO[:, row], codes_L)
        new_L = case.rows.error_IO[columns, row] - improved.change_LO[:, row]
        torch.testing.assert_close(new_L, error_I[columns], rtol=1e-9, atol=1e-9)


def joint_losses(case: Case, bits: int) -> torch.Tensor:
    """Return the least loss of each row, over the coefficients of all groups, that its codes allow."""
    least = []
    for codes_I, weight_I in zip(case.rows.codes_IO.T, case.weight_IO.T, strict=True):
        joint_IB = slow_joint_columns(codes_I, bits, case.group_size)
        error_I = weight_I - joint_IB @ slow_fit(weight_I, joint_IB, case.moment_II)
        least.append(error_I @ case.moment_II @ error_I)
    return torch.stack(least)


@pytest.mark.parametrize("bits", [2, 3])
def test_many_sweeps_lead_to_the_fit_of_all_coefficients_at_once(bits: int) -> None:
    """Up to float16, in which every fit is rounded."""
    case = random_case(39, 5, bits=bits, group_size=13)
    assert bool((case.losses() > 1.5 * joint_losses(case, bits)).all())
    for _ in range(20):
        sweep(case.rows, case.moment_II, case.table_KBO)
    least_O = joint_losses(case, bits)
    assert bool((case.losses() >= least_O * (1 - 1e-9)).all())
    assert bool((case.losses() <= least_O * (1 + 2e-3)).all())


@pytest.mark.parametrize("bits", [2, 3])
def test_fits_of_one_group_after_another_lead_to_the_joint_fit(bits: int) -> None:
    """The same with codes held and nothing rounded: what is left is the linear algebra."""
    case = random_case(39, 5, bits=bits, group_size=13)
    least_O = joint_losses(case, bits)
    error_IO = case.rows.error_IO.clone()
    for _ in range(300):
        for begin in range(0, 39, 13):
            group = slice(begin, begin + 13)
            columns_BLO = columns_of(case.table_KBO, case.rows.codes_IO[group])
            normal_BBO = torch.einsum("alo,lk,bko->abo", columns_BLO, case.moment_II[group, group], columns_BLO)
            slope_BO = torch.einsum("blo,lo->bo", columns_BLO, case.moment_II[group] @ error_IO)
            error_IO[group] -= torch.einsum("blo,bo->lo", columns_BLO, best_change(normal_BBO, slope_BO))
    torch.testing.assert_close(row_losses(error_IO, case.moment_II), least_O, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_whole_multiples_of_the_unit(shaped: bool, dtype: torch.dtype) -> None:
    case = random_case(40, 9, bits=3, group_size=10, shaped=shaped, dtype=dtype)
    sweep(case.rows, case.moment_II, case.table_KBO)
    unit_O = byte_units(case.rows.coefficient_GBO)
    sweep(case.rows, case.moment_II, case.table_KBO, unit_O=unit_O, forced=True)
    forced_O = case.losses()
    for _ in range(2):
        multiples_GBO = case.rows.coefficient_GBO / unit_O
        assert torch.equal(multiples_GBO.round() * unit_O, case.rows.coefficient_GBO)
        assert float(multiples_GBO.abs().max()) <= 127
        torch.testing.assert_close(case.rows.error_IO, case.weight_IO - case.level(), rtol=0, atol=1e-4)
        sweep(case.rows, case.moment_II, case.table_KBO, unit_O=unit_O)
    assert bool((case.losses() <= forced_O * (1 + 1e-5)).all())


@pytest.mark.parametrize("size", [1e5, 1.0, 3e-3, 1e-5, 1e-7, 0.0])
def test_units_hold_the_largest_coefficient_of_a_row(size: float) -> None:
    coefficient_GBO = size * torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit_O = byte_units(half_precision(coefficient_GBO))
    largest_O = half_precision(coefficient_GBO).abs().amax(dim=(0, 1))
    assert torch.equal(half_precision(unit_O), unit_O)
    assert bool((unit_O > 0).all())
    # Float16 rounds a unit by 2^-11 of it at most, which 127 times is less than the half unit that rounding allows.
    assert bool((largest_O <= unit_O * 127.07).all())
    # Not much larger than they must be: one step of float16 more.
    assert bool((unit_O <= largest_O / 127 * (1 + 2.0**-10) + 2.0**-24).all())


def test_columns_without_a_moment_keep_their_codes() -> None:
    case = random_case(24, 5, group_size=12)
    dead = [3, 13, 20]
    case.moment_II[dead] = 0
    case.moment_II[:, dead] = 0
    before_IO = case.rows.codes_IO.clone()
    for _ in range(3):
        sweep(case.rows, case.moment_II, case.table_KBO)
    assert torch.equal(case.rows.codes_IO[dead], before_IO[dead])
    assert not torch.equal(case.rows.codes_IO, before_IO)
    torch.testing.assert_close(case.rows.error_IO, case.weight_IO - case.level(), rtol=0, atol=1e-9)


def test_without_any_moment_nothing_changes() -> None:
    case = random_case(24, 5, group_size=12)
    before = case.rows.codes_IO.clone(), case.rows.coefficient_GBO.clone(), case.rows.error_IO.clone()
    sweep(case.rows, torch.zeros(24, 24, dtype=torch.float64), case.table_KBO)
    for old, new in zip(before, (case.rows.codes_IO, case.rows.coefficient_GBO, case.rows.error_IO), strict=True):
        assert torch.equal(old, new)


def test_what_is_passed_to_a_step_stays() -> None:
    case = random_case(24, 5, group_size=12)
    passed = (
        case.moment_II[:12] @ case.rows.error_IO,
        case.moment_II[:12, :12],
        case.rows.codes_IO[:12],
        case.rows.coefficient_GBO[0],
        case.table_KBO,
    )
    before = [values.clone() for values in passed]
    improve_group(*passed, unit_O=None, forced=False)
    for old, new in zip(before, passed, strict=True):
        assert torch.equal(old, new)
