"""Binary codes from problem to solution: identities, orders, storages, and what happens at the edges."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.binary_problems import binary_problem, stored
from support.binary_weights import same_binary, slow_dense
from support.problems import problem, random_moment, random_weight
from support.slow_binary import row_losses
from support.slow_gptq import slow_order

from optgptq.solvers import binary as binary_module
from optgptq.solvers import gptq
from optgptq.solvers.binary import solve

STORAGES: tuple[Any, ...] = ("float", "int8", "steps")
SIZES = [(5, 96, 32), (5, 39, 13), (3, 40, -1)]


@pytest.mark.parametrize("coefficients", STORAGES)
@pytest.mark.parametrize(("num_rows", "num_columns", "group_size"), SIZES)
@pytest.mark.parametrize(("order", "bits"), [("natural", 2), ("group_aware", 2), ("group_aware", 3)])
def test_the_loss_is_that_of_the_weight_that_is_stored(
    coefficients: str, num_rows: int, num_columns: int, group_size: int, order: str, bits: int
) -> None:
    """Columns, groups and planes in a wrong order would show here."""
    weight_OI, moment_II = random_weight(num_rows, num_columns), random_moment(num_columns)
    asked = binary_problem(
        weight_OI, moment_II, bits=bits, group_size=group_size, order=order, binary={"coefficients": coefficients}
    )
    solution = solve(asked)
    weight = stored(solution)
    assert weight.coefficients.storage == coefficients
    assert (weight.bits, weight.group_size, weight.column_order_I) == (bits, asked.group_size, None)
    dense_OI = slow_dense(weight)
    torch.testing.assert_close(weight.dequantize(), dense_OI.float(), rtol=1e-5, atol=1e-6)
    losses_O = row_losses((weight_OI - dense_OI).T, moment_II)
    torch.testing.assert_close(solution.row_loss_O, losses_O, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solution.row_energy_O, row_losses(weight_OI.T, moment_II), rtol=1e-9, atol=1e-9)
    level_OIK = weight.levels().double().repeat_interleave(asked.group_size, dim=1)
    nearest_OI = (weight_OI[:, :, None] - level_OIK).abs().amin(dim=2)
    assert bool((nearest_OI <= (weight_OI - dense_OI).abs() + 1e-5).all())
    assert solution.loss < solution.rtn_loss
    assert solution.notes == ()


@pytest.mark.parametrize("coefficients", STORAGES)
def test_float32_is_told_the_loss_of_what_is_stored(coefficients: str) -> None:
    weight_OI, moment_II = random_weight(40, 128).float(), random_moment(128).float()
    asked = binary_problem(
        weight_OI, moment_II, bits=3, group_size=32, dtype=torch.float32, binary={"coefficients": coefficients}
    )
    solution = solve(asked)
    losses_O = row_losses((weight_OI - stored(solution).dequantize()).T, moment_II)
    # Where the processor has them, these energies are products of bfloat16 numbers.
    torch.testing.assert_close(solution.row_loss_O, losses_O, rtol=0.05, atol=0)
    assert solution.loss == pytest.approx(float(losses_O.sum() / row_losses(weight_OI.T, moment_II).sum()), rel=0.01)
    double = solve(replace(asked, settings=replace(asked.settings, dtype=torch.float64)))
    assert solution.loss == pytest.approx(double.loss, rel=0.03)


@pytest.mark.parametrize("coefficients", STORAGES)
def test_the_group_aware_order_is_permute_solve_and_permute_back(coefficients: str) -> None:
    weight_OI, moment_II = random_weight(5, 96), random_moment(96)
    places = slow_order(moment_II, "group_aware", group_size=32)
    groups = [place // 32 for place in places[::32]]
    assert groups != [0, 1, 2]
    binary = {"coefficients": coefficients}
    ordered = stored(solve(binary_problem(weight_OI, moment_II, group_size=32, order="group_aware", binary=binary)))
    permuted_II = moment_II[places][:, places]
    permuted = stored(
        solve(binary_problem(weight_OI[:, places], permuted_II, group_size=32, order="natural", binary=binary))
    )
    assert torch.equal(ordered.codes_OI[:, places], permuted.codes_OI)
    for own, other in zip(ordered.coefficients.values(), permuted.coefficients.values(), strict=True):
        assert torch.equal(own[:, groups], other)


@pytest.mark.parametrize("order", ["activation", "min_pivot"])
def test_free_orders_where_one_group_spans_the_row(order: str) -> None:
    weight_OI, moment_II = random_weight(4, 54), random_moment(54)
    places = slow_order(moment_II, order, group_size=-1)
    ordered = stored(solve(binary_problem(weight_OI, moment_II, order=order)))
    permuted = stored(solve(binary_problem(weight_OI[:, places], moment_II[places][:, places], order="natural")))
    assert torch.equal(ordered.codes_OI[:, places], permuted.codes_OI)
    assert torch.equal(ordered.coefficients.values()[0], permuted.coefficients.values()[0])
    with pytest.raises(ValueError, match=f"{order} order scatters groups"):
        solve(binary_problem(weight_OI, moment_II, group_size=18, order=order))


@pytest.mark.parametrize("coefficients", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_influence_each_other(
    coefficients: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = binary_problem(
        random_weight(11, 48),
        random_moment(48),
        bits=3,
        group_size=16,
        dtype=dtype,
        binary={"coefficients": coefficients},
    )
    whole = solve(asked)
    order_O = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    shuffled = solve(replace(asked, weight_OI=asked.weight_OI[order_O]))
    monkeypatch.setattr(binary_module, "_ROWS", 4)
    chunked = solve(asked)
    if dtype == torch.float64:
        assert same_binary(stored(shuffled), stored(whole).select(order_O))
        assert same_binary(stored(chunked), stored(whole))
    tolerance = 1e-9 if dtype == torch.float64 else 0.3
    torch.testing.assert_close(shuffled.row_loss_O, whole.row_loss_O[order_O], rtol=tolerance, atol=0)
    torch.testing.assert_close(chunked.row_loss_O, whole.row_loss_O, rtol=tolerance, atol=0)


def test_bytes_cost_little() -> None:
    weight_OI, moment_II = random_weight(32, 256).float(), random_moment(256).float()
    for bits in (2, 3):
        losses = {}
        for coefficients in ("float", "int8"):
            binary = {"coefficients": coefficients, "sweeps": 3}
            solution = solve(
                binary_problem(weight_OI, moment_II, bits=bits, group_size=128, dtype=torch.float32, binary=binary)
            )
            losses[coefficients] = float(row_losses((weight_OI - stored(solution).dequantize()).T, moment_II).sum())
        assert losses["int8"] < 1.02 * losses["float"]


@pytest.mark.parametrize("bits", [2, 3])
def test_every_part_of_the_method_pays(bits: int) -> None:
    weight_OI, moment_II = random_weight(48, 96), random_moment(96)

    def loss(**binary: Any) -> float:
        return solve(binary_problem(weight_OI, moment_II, bits=bits, group_size=32, binary=binary)).loss

    plain = loss(weighting="none", uniform_start=False, refits=0, sweeps=0)
    priced = loss(uniform_start=False, refits=0, sweeps=0)
    fitted = loss(refits=3, sweeps=0)
    swept = [loss(refits=3, sweeps=sweeps) for sweeps in (1, 3)]
    assert priced < plain
    assert fitted < 0.95 * priced
    assert swept[0] < 0.95 * fitted
    assert swept[1] < swept[0]
    uniform = problem(weight_OI, moment_II, bits=bits, symmetric=False, group_size=32, search="walk", backend="torch")
    assert swept[1] < 0.7 * gptq.solve(uniform).loss
    assert loss(coefficients="steps") < 0.9 * gptq.solve(uniform).loss


@pytest.mark.parametrize(("weighting", "bits"), [("none", 2), ("diagonal", 3), ("pivot", 2)])
def test_sweeps_lower_the_loss_of_every_row(weighting: str, bits: int) -> None:
    weight_OI, moment_II = random_weight(12, 60), random_moment(60)
    losses = [
        solve(
            binary_problem(
                weight_OI, moment_II, bits=bits, group_size=20, binary={"weighting": weighting, "sweeps": sweeps}
            )
        )
        for sweeps in range(4)
    ]
    for fewer, more in itertools.pairwise(losses):
        assert bool((more.row_loss_O <= fewer.row_loss_O * (1 + 1e-9)).all())


def test_a_group_never_costs_more_than_with_its_uniform_grid() -> None:
    """In the first group, where all methods stand on the same weights."""
    weight_OI, moment_II = random_weight(60, 32), random_moment(32)
    damped_II = moment_II + 0.01 * float(moment_II.diagonal().mean()) * torch.eye(32, dtype=torch.float64)
    for bits in (2, 3):
        binary = solve(binary_problem(weight_OI, moment_II, bits=bits, binary={"refits": 0, "sweeps": 0}))
        uniform = problem(
            weight_OI, moment_II, bits=bits, symmetric=False, search="pivot", backend="torch", damp_ratio=0.01
        )
        costs = [
            row_losses((weight_OI - weight.dequantize().double()).T, damped_II)
            for weight in (binary.weight, gptq.solve(uniform).weight)
        ]
        assert bool((costs[0] <= costs[1] * (1 + 1e-6)).all())
        assert float(costs[0].sum()) < 0.9 * float(costs[1].sum())


def test_steps_are_one_shape_for_a_row() -> None:
    weight_OI, moment_II = random_weight(9, 96), random_moment(96)
    for bits, intermediate_bits in ((2, 4), (2, 6), (3, 5)):
        binary = {"coefficients": "steps", "intermediate_bits": intermediate_bits, "scales": (0.8, 1.0, 0.2)}
        weight = stored(solve(binary_problem(weight_OI, moment_II, bits=bits, group_size=32, binary=binary)))
        steps_OP, scale_OG, _ = weight.coefficients.tensors()
        assert (steps_OP.shape, steps_OP.dtype) == ((9, bits), torch.uint8)
        assert scale_OG.shape == (9, 3)
        assert int(steps_OP.min()) >= 1
        assert int(steps_OP.long().sum(dim=1).max()) <= 2**intermediate_bits - 1


def test_clipped_weights_are_counted() -> None:
    weight_OI, moment_II = random_weight(200, 32), torch.eye(32, dtype=torch.float64)
    solution = solve(binary_problem(weight_OI, moment_II, bits=3, binary={"sweeps": 0}))
    assert 0.0 < solution.clip_fraction < 0.2
    level_OK = stored(solution).levels()[:, 0].double().sort(dim=1).values
    half_gap_O1 = level_OK.diff(dim=1).amax(dim=1, keepdim=True) / 2 * (1 + 1e-3)
    distance_OI = (weight_OI[:, :, None] - level_OK[:, None]).abs().amin(dim=2)
    clipped_O = (distance_OI > half_gap_O1).double().mean(dim=1)
    torch.testing.assert_close(solution.row_clipped_O, clipped_O, rtol=0, atol=1e-9)
