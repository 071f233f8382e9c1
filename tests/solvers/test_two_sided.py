"""The two-sided solver against dense GPTQ on the Kronecker product, its identities, and what it falls back to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import problem, random_moment, random_weight
from support.slow_gptq import slow_order
from support.slow_two_sided import damped, descending, output_moments, slow_two_sided, two_sided_loss

from optgptq.solvers import LayerProblem, LayerSolution, gptq, two_sided

HEADS, HEAD_SIZE, COLUMNS = 3, 5, 30
GRIDS = [(2, True), (2, False), (3, True), (3, False), (4, True), (4, False)]


def coupled(
    *, num_heads: int = HEADS, head_size: int = HEAD_SIZE, num_columns: int = COLUMNS, seed: int = 0, **keywords: Any
) -> LayerProblem:
    """Return a random problem whose heads couple their rows; keywords go to `problem`."""
    case = problem(
        random_weight(num_heads * head_size, num_columns, seed=seed),
        random_moment(num_columns, seed=seed),
        **{"search": "walk", "column_block": 7, **keywords},
    )
    return replace(case, output_moment_NDD=output_moments(num_heads, head_size, seed=seed))


def moments(case: LayerProblem) -> torch.Tensor:
    assert case.output_moment_NDD is not None
    return case.output_moment_NDD


def error(case: LayerProblem, solution: LayerSolution) -> torch.Tensor:
    return case.weight_OI.double() - solution.weight.dequantize().double()


def loss(case: LayerProblem, solution: LayerSolution) -> float:
    return two_sided_loss(error(case, solution), case.input_moment_II, moments(case))


def row_orders(case: LayerProblem) -> list[list[int]]:
    if case.settings.row_order == "natural":
        return [list(range(moments(case).shape[1]))] * len(moments(case))
    return [descending(moment_DD) for moment_DD in moments(case)]


def compare(case: LayerProblem) -> LayerSolution:
    """Assert that dense GPTQ on the solution's grids gives the solution's codes; return the solution."""
    solution = two_sided.solve(case)
    weight = solution.weight
    size = weight.group_size
    slow = slow_two_sided(
        case.weight_OI,
        case.input_moment_II,
        moments(case),
        bits=case.grid.bits,
        columns=slow_order(case.input_moment_II, case.settings.order, group_size=case.grid.group_size),
        rows=row_orders(case),
        grids=(weight.scale_OG.repeat_interleave(size, dim=1), weight.zero_point_OG.repeat_interleave(size, dim=1)),
    )
    assert torch.equal(weight.codes_OI, slow.codes_OI)
    full_NDD = torch.stack([damped(moment_DD) for moment_DD in moments(case)])
    paid = two_sided_loss(error(case, solution), damped(case.input_moment_II), full_NDD)
    assert slow.paid == pytest.approx(paid, rel=1e-9)
    return solution


def assert_same(first: LayerSolution, second: LayerSolution) -> None:
    assert torch.equal(first.weight.codes_OI, second.weight.codes_OI)
    assert torch.equal(first.weight.scale_OG, second.weight.scale_OG)
    assert torch.equal(first.weight.zero_point_OG, second.weight.zero_point_OG)
    assert torch.equal(first.row_clipped_O, second.row_clipped_O)


@pytest.mark.parametrize("group_size", [-1, 10])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_static_grids_equal_dense_gptq_on_the_kronecker_product(bits: int, symmetric: bool, group_size: int) -> None:
    """Whatever the row block and the way rows are walked: both only change the time."""
    case = coupled(bits=bits, symmetric=symmetric, group_size=group_size, group_grids="static", seed=bits)
    first = compare(case)
    for row_mode in ("rows", "wavefront"):
        for row_block in (1, 2, 4, -1):
            other = replace(case, settings=replace(case.settings, row_mode=row_mode, row_block=row_block))
            assert_same(two_sided.solve(other), first)


@pytest.mark.parametrize("row_order", ["natural", "activation"])
@pytest.mark.parametrize("order", ["natural", "activation", "group_aware", "min_pivot"])
def test_every_order_equals_dense_gptq(order: str, row_order: str) -> None:
    for row_mode in ("rows", "wavefront"):
        case = coupled(bits=3, group_size=6, group_grids="static", order=order, row_order=row_order, row_mode=row_mode)
        compare(case)


@pytest.mark.parametrize("group_size", [-1, 10])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_adaptive_grids_give_the_codes_of_dense_gptq(bits: int, symmetric: bool, group_size: int) -> None:
    case = coupled(bits=bits, symmetric=symmetric, group_size=group_size, seed=bits)
    for row_block in (1, 3, -1):
        blocked = replace(case, settings=replace(case.settings, row_block=row_block))
        first = compare(blocked)
        wave = replace(blocked, settings=replace(blocked.settings, row_mode="wavefront", column_block=16))
        assert_same(two_sided.solve(wave), first)


@pytest.mark.parametrize("search", ["minmax", "mse", "hessian", "pivot", "walk"])
@pytest.mark.parametrize("group_size", [-1, 10])
def test_each_row_is_one_sided_gptq_on_the_optimum_that_earlier_rows_leave(group_size: int, search: str) -> None:
    """With the rows before it fixed, the loss is smallest where the gradient of all others is zero: GPTQ starts there.

    The grids are then those of this row as well, since they are read from weights that carry all compensation.
    """
    case = coupled(num_heads=1, bits=3, group_size=group_size, search=search, order="natural", row_order="natural")
    solution = two_sided.solve(case)
    output_DD, error_DI = damped(moments(case)[0]), error(case, solution)
    for row in range(1, HEAD_SIZE):
        free_DD = output_DD[row:, row:]
        best_error_DI = -torch.linalg.solve(free_DD, output_DD[row:, :row] @ error_DI[:row])
        fixed_DI = torch.cat([error_DI[:row], best_error_DI])
        gradient_DI = (output_DD @ fixed_DI @ damped(case.input_moment_II))[row:]
        assert float(gradient_DI.abs().max()) < 1e-9
        start_OI = case.weight_OI[row : row + 1] - best_error_DI[:1]
        one_sided = gptq.solve(replace(case, weight_OI=start_OI, output_moment_NDD=None))
        assert torch.equal(one_sided.weight.codes_OI[0], solution.weight.codes_OI[row])
        assert torch.equal(one_sided.weight.scale_OG[0], solution.weight.scale_OG[row])
        assert torch.equal(one_sided.weight.zero_point_OG[0], solution.weight.zero_point_OG[row])


def test_the_whole_head_as_one_block_has_the_grids_of_one_sided_gptq() -> None:
    """Where one group spans the row; the codes differ, since the walk stays two-sided."""
    case = coupled(bits=3, row_block=-1)
    solution, one_sided = two_sided.solve(case), gptq.solve(case)
    assert torch.equal(solution.weight.scale_OG, one_sided.weight.scale_OG)
    assert not torch.equal(solution.weight.codes_OI, one_sided.weight.codes_OI)


@pytest.mark.parametrize("group_grids", ["dynamic", "static"])
@pytest.mark.parametrize("row_mode", ["rows", "wavefront"])
def test_losses_are_those_of_the_decoded_weight_and_the_undamped_moments(row_mode: str, group_grids: str) -> None:
    case = coupled(bits=3, group_size=10, group_grids=group_grids, row_mode=row_mode)
    solution = two_sided.solve(case)
    assert solution.coupled is not None
    error_OI, moment_II = error(case, solution), case.input_moment_II
    torch.testing.assert_close(solution.row_loss_O, ((error_OI @ moment_II) * error_OI).sum(dim=1))
    torch.testing.assert_close(solution.row_energy_O, ((case.weight_OI @ moment_II) * case.weight_OI).sum(dim=1))
    energy = two_sided_loss(case.weight_OI, moment_II, moments(case))
    assert float(solution.coupled.energy_O.sum()) == pytest.approx(energy, rel=1e-9)
    assert solution.coupled.loss == pytest.approx(loss(case, solution) / energy, rel=1e-9)
    assert solution.coupled.loss < 0.7 * solution.coupled.rtn_loss
    head = solution.rows(HEAD_SIZE, 2 * HEAD_SIZE)
    assert head.coupled is not None
    own = two_sided_loss(error_OI[HEAD_SIZE : 2 * HEAD_SIZE], moment_II, moments(case)[1:2])
    assert float(head.coupled.loss_O.sum()) == pytest.approx(own, rel=1e-9)


@pytest.mark.parametrize("row_block", [1, -1])
@pytest.mark.parametrize(("group_size", "group_grids"), [(-1, "dynamic"), (12, "dynamic"), (12, "static")])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (3, True), (4, False)])
def test_coupled_heads_lose_less_than_by_one_sided_gptq(
    bits: int, symmetric: bool, group_size: int, group_grids: str, row_block: int
) -> None:
    two, one = 0.0, 0.0
    for seed in range(4):
        case = coupled(
            num_heads=2,
            head_size=8,
            num_columns=48,
            seed=seed,
            bits=bits,
            symmetric=symmetric,
            group_size=group_size,
            group_grids=group_grids,
            row_block=row_block,
            row_mode="wavefront",
        )
        two += loss(case, two_sided.solve(case))
        one += loss(case, gptq.solve(case))
    assert two < 0.9 * one


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_size_any_mode(data: st.DataObject) -> None:
    """Rows after rows, anti-diagonals, and each head by itself give the same codes."""
    group_size = data.draw(st.integers(1, 9), label="group_size")
    case = coupled(
        num_heads=data.draw(st.integers(1, 3), label="num_heads"),
        head_size=data.draw(st.integers(2, 7), label="head_size"),
        num_columns=group_size * data.draw(st.integers(1, 4), label="num_groups"),
        seed=data.draw(st.integers(0, 50), label="seed"),
        bits=data.draw(st.sampled_from([2, 3, 4, 8]), label="bits"),
        symmetric=data.draw(st.booleans(), label="symmetric"),
        group_size=data.draw(st.sampled_from([group_size, -1]), label="used_group_size"),
        group_grids=data.draw(st.sampled_from(["static", "dynamic"]), label="group_grids"),
        row_block=data.draw(st.sampled_from([-1, 1, 2, 3]), label="row_block"),
        column_block=data.draw(st.sampled_from([1, 3, 16]), label="column_block"),
    )
    solution = two_sided.solve(case)
    wave = two_sided.solve(replace(case, settings=replace(case.settings, row_mode="wavefront")))
    assert_same(wave, solution)
    head_size = moments(case).shape[1]
    for head in range(len(moments(case))):
        rows = slice(head * head_size, (head + 1) * head_size)
        part = replace(case, weight_OI=case.weight_OI[rows], output_moment_NDD=moments(case)[head : head + 1])
        assert_same(two_sided.solve(part), solution.rows(rows.start, rows.stop))


def test_orders_of_rows_and_heads_are_permute_solve_and_permute_back() -> None:
    case = coupled(bits=3, group_size=10)
    solution = two_sided.solve(case)
    heads = [2, 0, 1]
    rows = [head * HEAD_SIZE + row for head in heads for row in row_orders(case)[head]]
    sorted_NDD = torch.stack([moments(case)[head][row_orders(case)[head]][:, row_orders(case)[head]] for head in heads])
    permuted = replace(
        case,
        weight_OI=case.weight_OI[rows],
        output_moment_NDD=sorted_NDD,
        settings=replace(case.settings, row_order="natural"),
    )
    other = two_sided.solve(permuted)
    assert torch.equal(other.weight.codes_OI, solution.weight.codes_OI[rows])
    assert torch.equal(other.weight.scale_OG, solution.weight.scale_OG[rows])
    torch.testing.assert_close(other.row_loss_O, solution.row_loss_O[rows])
    assert solution.coupled is not None
    assert other.coupled is not None
    torch.testing.assert_close(other.coupled.loss_O, solution.coupled.loss_O[rows])
    torch.testing.assert_close(other.row_clipped_O, solution.row_clipped_O[rows])


@pytest.mark.parametrize("row_mode", ["rows", "wavefront"])
def test_the_scale_of_an_output_moment_says_nothing(row_mode: str) -> None:
    case = coupled(bits=3, group_size=10, group_grids="static", row_mode=row_mode)
    scaled_NDD = moments(case) * torch.tensor([4.0**-20, 1.0, 4.0**20], dtype=torch.float64)[:, None, None]
    assert_same(two_sided.solve(replace(case, output_moment_NDD=scaled_NDD)), two_sided.solve(case))


@pytest.mark.parametrize("row_mode", ["rows", "wavefront"])
def test_float32_loses_as_much_as_float64(row_mode: str) -> None:
    losses = []
    for dtype in (torch.float32, torch.float64):
        case = coupled(num_heads=4, head_size=16, num_columns=96, bits=3, group_size=32, row_mode=row_mode, dtype=dtype)
        solution = two_sided.solve(case)
        assert (solution.weight.scale_OG.dtype, solution.weight.zero_point_OG.dtype) == (torch.float32, torch.int32)
        losses.append(loss(case, solution))
        assert solution.coupled is not None
        reported = float(solution.coupled.loss_O.sum())
        assert reported == pytest.approx(losses[-1], rel=2e-2 if dtype == torch.float32 else 1e-9)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
