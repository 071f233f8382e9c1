"""Binary codes of weights and moments that say little or nothing, or are far too large."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.binary_problems import binary_problem, stored
from support.binary_weights import slow_dense
from support.problems import random_moment, random_weight
from support.slow_binary import row_losses

from optgptq.errors import NumericalError
from optgptq.solvers.binary import solve

STORAGES = ("float", "int8", "steps")


@pytest.mark.parametrize("coefficients", STORAGES)
def test_weights_that_are_on_few_levels_are_kept(coefficients: str) -> None:
    """Groups of zeros, constants, and two values that float16 and bytes hold, beside each other."""
    weight_OI = torch.zeros(5, 48, dtype=torch.float64)
    weight_OI[1, 16:32] = 0.5
    weight_OI[2] = torch.tensor([0.5, -0.5]).repeat(24)
    weight_OI[3, ::3] = -0.75
    weight_OI[4] = torch.tensor([0.5, -0.25]).repeat(24)
    # Both of `-a` and `a` lie half-way between whole numbers; one shape has no coefficient to spare for that.
    kept = [0, 1, 3, 4] if coefficients == "steps" else [0, 1, 2, 3, 4]
    binary = {"coefficients": coefficients}
    for bits in (2, 3):
        solution = solve(binary_problem(weight_OI, random_moment(48), bits=bits, group_size=16, binary=binary))
        dense_OI = stored(solution).dequantize().double()
        assert torch.equal(dense_OI[0], weight_OI[0])
        torch.testing.assert_close(dense_OI[kept], weight_OI[kept], rtol=0, atol=5e-3)


def test_a_group_of_zeros_leaves_the_bytes_of_its_row_to_the_others() -> None:
    weight_OI, moment_II = 0.01 * random_weight(6, 64), random_moment(64)
    weight_OI[:, :32] = 0
    # No token meets both groups, so that zeros have nothing to make up for.
    moment_II[:32, 32:] = 0
    moment_II[32:, :32] = 0
    binary = {"coefficients": "int8"}
    solution = solve(binary_problem(weight_OI, moment_II, group_size=32, order="natural", binary=binary))
    assert float(stored(solution).coefficients.tensors()[2].max()) < 0.1 / 127
    alone = solve(binary_problem(weight_OI[:, 32:], moment_II[32:, 32:], group_size=32, order="natural", binary=binary))
    torch.testing.assert_close(solution.row_loss_O, alone.row_loss_O, rtol=0.05, atol=0)
    assert torch.equal(stored(solution).dequantize()[:, :32], torch.zeros(6, 32))


@pytest.mark.parametrize("coefficients", STORAGES)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1e5, torch.float32), (1e5, torch.float64), (1e-3, torch.float64), (1e-7, torch.float32), (1e-30, torch.float32)],
)
def test_very_large_and_very_small_weights(coefficients: str, size: float, dtype: torch.dtype) -> None:
    weight_OI, moment_II = random_weight(5, 48), random_moment(48)
    asked = binary_problem(
        weight_OI * size, moment_II, group_size=16, dtype=dtype, binary={"coefficients": coefficients}
    )
    solution = solve(asked)
    dense_OI = stored(solution).dequantize().double()
    assert bool(torch.isfinite(dense_OI).all())
    assert bool(torch.isfinite(solution.row_loss_O).all())
    assert float((dense_OI - weight_OI * size).abs().max()) <= float((weight_OI * size).abs().max()) + 2.0**-24
    assert [note for note in solution.notes if "cut off at 65504" in note] == list(solution.notes)
    assert bool(solution.notes) == (size == 1e5)
    usual = solve(replace(asked, weight_OI=weight_OI))
    if size == 1e-3:
        assert solution.loss == pytest.approx(usual.loss, rel=0.1)


@pytest.mark.parametrize("coefficients", STORAGES)
def test_a_huge_outlier_stays_in_its_group(coefficients: str) -> None:
    weight_OI, moment_II = random_weight(6, 64), random_moment(64)
    usual = solve(
        binary_problem(weight_OI, moment_II, group_size=16, order="natural", binary={"coefficients": coefficients})
    )
    weight_OI[2, 5] = 3e4
    solution = solve(
        binary_problem(weight_OI, moment_II, group_size=16, order="natural", binary={"coefficients": coefficients})
    )
    dense_OI = stored(solution).dequantize().double()
    assert bool(torch.isfinite(dense_OI).all())
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(solution.row_loss_O[others], usual.row_loss_O[others], rtol=1e-9, atol=0)
    assert float(solution.row_loss_O[2]) < 1e-3 * float(solution.row_energy_O[2])


@pytest.mark.parametrize(
    ("coefficients", "weighting"), [("float", "none"), ("int8", "diagonal"), ("steps", "diagonal"), ("int8", "pivot")]
)
def test_dead_inputs_are_rounded_to_the_nearest_level(coefficients: str, weighting: str) -> None:
    weight_OI, moment_II = random_weight(7, 48), random_moment(48)
    dead = [0, 7, 20, *range(32, 48)]
    moment_II[dead] = 0
    moment_II[:, dead] = 0
    binary = {"coefficients": coefficients, "weighting": weighting}
    for order in ("natural", "group_aware"):
        solution = solve(binary_problem(weight_OI, moment_II, group_size=16, order=order, binary=binary))
        assert solution.num_dead_inputs == 19
        weight = stored(solution)
        level_OIK = weight.levels().double().repeat_interleave(16, dim=1)
        nearest_OI = (weight_OI[:, :, None] - level_OIK).abs().amin(dim=2)
        error_OI = (weight_OI - weight.dequantize().double()).abs()
        torch.testing.assert_close(error_OI[:, dead], nearest_OI[:, dead], rtol=1e-5, atol=1e-5)
        # A group without any token is a group all the same.
        assert float(error_OI[:, 32:].square().mean()) < 0.35 * float(weight_OI[:, 32:].square().mean())
        losses_O = row_losses((weight_OI - slow_dense(weight)).T, moment_II)
        torch.testing.assert_close(solution.row_loss_O, losses_O, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighting", ["none", "diagonal", "pivot"])
def test_levels_of_a_dead_group_are_searched_too(weighting: str) -> None:
    weight_OI, moment_II = random_weight(20, 32), random_moment(32)
    moment_II[16:] = 0
    moment_II[:, 16:] = 0
    binary = {"weighting": weighting, "uniform_start": False, "refits": 0, "sweeps": 0}
    solution = solve(binary_problem(weight_OI, moment_II, bits=3, group_size=16, binary=binary))
    error_OI = weight_OI - stored(solution).dequantize().double()
    assert float(error_OI[:, 16:].square().mean()) < 0.05 * float(weight_OI[:, 16:].square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_moments_that_say_little(num_tokens: int, dtype: torch.dtype) -> None:
    weight_OI = random_weight(6, 32)
    moment_II = random_moment(32, num_tokens=num_tokens) if num_tokens else torch.zeros(32, 32, dtype=torch.float64)
    before = weight_OI.clone(), moment_II.clone()
    for coefficients in STORAGES:
        solution = solve(
            binary_problem(weight_OI, moment_II, group_size=16, dtype=dtype, binary={"coefficients": coefficients})
        )
        dense_OI = stored(solution).dequantize().double()
        assert bool(torch.isfinite(dense_OI).all())
        assert solution.loss <= solution.rtn_loss
        assert float((dense_OI - weight_OI).square().mean()) < float(weight_OI.square().mean())
    assert torch.equal(weight_OI, before[0])
    assert torch.equal(moment_II, before[1])


def test_a_moment_that_is_not_finite_stops_the_solve() -> None:
    moment_II = random_moment(16)
    moment_II[3, 3] = float("nan")
    with pytest.raises(NumericalError, match="linear: input moment"):
        solve(binary_problem(random_weight(4, 16), moment_II))
