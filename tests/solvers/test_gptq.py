"""GPTQ against its slow reference, its identities, and what happens at the edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import problem, random_moment, random_weight
from support.slow_gptq import slow_gptq, slow_order

from optgptq.solvers import METHODS, LayerProblem, LayerSolution
from optgptq.solvers import gptq as gptq_module

gptq, rtn = METHODS["gptq"].solver, METHODS["rtn"].solver

SIZES = [(48, 16), (96, 32), (130, 13), (63, 63), (130, -1)]
SEARCHES = ("minmax", "mse", "hessian", "pivot", "walk")


def compare(case: LayerProblem, *, own_grids: bool) -> None:
    """Assert that the slow walk gives the same codes, and with `own_grids` that it finds the same grids by itself."""
    grid, settings = case.grid, case.settings
    solution = gptq(case)
    scale_OG, zero_point_OG = solution.weight.scale_OG.double(), solution.weight.zero_point_OG.double()
    slow = slow_gptq(
        case.weight_OI,
        case.input_moment_II,
        bits=grid.bits,
        symmetric=grid.symmetric,
        group_size=grid.group_size,
        order=slow_order(case.input_moment_II, settings.order, group_size=grid.group_size),
        static=grid.group_grids == "static",
        damp_ratio=settings.damp_ratio,
        grids=None if own_grids else (scale_OG, zero_point_OG),
        smallest_zero_point=grid.smallest_zero_point,
    )
    assert torch.equal(scale_OG, slow.scale_OG)
    assert torch.equal(zero_point_OG, slow.zero_point_OG)
    assert torch.equal(solution.weight.codes_OI, slow.codes_OI)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("num_columns", "group_size"), SIZES)
def test_dynamic_minmax_grids_equal_the_slow_walk(
    num_columns: int, group_size: int, bits: int, symmetric: bool
) -> None:
    weight_OI, moment_II = random_weight(9, num_columns, seed=bits), random_moment(num_columns, seed=bits)
    for order in ("natural", "group_aware"):
        case = problem(weight_OI, moment_II, bits=bits, symmetric=symmetric, group_size=group_size, order=order)
        compare(case, own_grids=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["natural", "activation", "group_aware", "min_pivot"])
@pytest.mark.parametrize(("num_columns", "group_size"), SIZES)
def test_static_minmax_grids_equal_the_slow_walk_in_every_order(
    num_columns: int, group_size: int, order: str, symmetric: bool
) -> None:
    weight_OI, moment_II = random_weight(9, num_columns), random_moment(num_columns)
    for bits in (2, 4):
        compare(
            problem(
                weight_OI,
                moment_II,
                bits=bits,
                symmetric=symmetric,
                group_size=group_size,
                group_grids="static",
                order=order,
            ),
            own_grids=True,
        )


@pytest.mark.parametrize("order", ["activation", "min_pivot"])
def test_free_orders_take_dynamic_grids_where_one_group_spans_the_row(order: str) -> None:
    compare(problem(random_weight(9, 70), random_moment(70), bits=3, order=order), own_grids=True)


@pytest.mark.parametrize("search", SEARCHES[1:])
@pytest.mark.parametrize("group_grids", ["dynamic", "static"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (3, True), (4, False), (8, False)])
def test_searched_grids_give_the_codes_of_the_slow_walk(
    search: str, group_grids: str, bits: int, symmetric: bool
) -> None:
    for num_columns, group_size in [(48, 16), (65, 13)]:
        case = problem(
            random_weight(9, num_columns, seed=bits),
            random_moment(num_columns, seed=bits),
            bits=bits,
            symmetric=symmetric,
            group_size=group_size,
            search=search,
            group_grids=group_grids,
        )
        compare(case, own_grids=False)


@pytest.mark.parametrize("order", ["natural", "activation", "group_aware", "min_pivot"])
def test_identities_of_the_walk(order: str) -> None:
    weight_OI, moment_II = random_weight(7, 60), random_moment(60)
    case = problem(weight_OI, moment_II, group_size=12, group_grids="static", order=order, search="mse")
    weight = gptq(case).weight
    places = slow_order(moment_II, order, group_size=12)
    slow = slow_gptq(
        weight_OI,
        moment_II,
        bits=4,
        symmetric=True,
        group_size=12,
        order=places,
        grids=(weight.scale_OG.double(), weight.zero_point_OG.double()),
    )
    difference_OI = (weight_OI - weight.dequantize().double())[:, places]
    torch.testing.assert_close(difference_OI, slow.errors_OI @ slow.upper_II, rtol=1e-9, atol=1e-9)
    trace = float(((difference_OI @ slow.damped_II) * difference_OI).sum())
    assert float(slow.errors_OI.square().sum()) == pytest.approx(trace, rel=1e-9)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("num_columns", "group_size"), [(130, 13), (130, -1)])
def test_the_column_block_changes_nothing(search: str, num_columns: int, group_size: int) -> None:
    weight_OI, moment_II = random_weight(8, num_columns), random_moment(num_columns)
    case = problem(weight_OI, moment_II, bits=3, symmetric=False, group_size=group_size, search=search)
    for group_grids in ("dynamic", "static"):
        base = replace(case, grid=replace(case.grid, group_grids=group_grids))
        blocks = [
            gptq(replace(base, settings=replace(base.settings, column_block=block)))
            for block in (1, 7, 16, 128, num_columns)
        ]
        for solution in blocks[1:]:
            assert torch.equal(solution.weight.codes_OI, blocks[0].weight.codes_OI)
            assert torch.equal(solution.weight.scale_OG, blocks[0].weight.scale_OG)
            assert torch.equal(solution.weight.zero_point_OG, blocks[0].weight.zero_point_OG)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_inside_a_block_carries_the_compensation_of_that_block(symmetric: bool) -> None:
    """Grids read from weights without it, as published code does, would differ: this is also asserted."""
    weight_OI, moment_II = random_weight(16, 128), random_moment(128)
    wide = problem(weight_OI, moment_II, symmetric=symmetric, group_size=16, column_block=128, order="natural")
    narrow = replace(wide, settings=replace(wide.settings, column_block=16))
    assert torch.equal(gptq(wide).weight.scale_OG, gptq(narrow).weight.scale_OG)
    assert torch.equal(gptq(wide).weight.codes_OI, gptq(narrow).weight.codes_OI)
    static = replace(wide, grid=replace(wide.grid, group_grids="static"))
    assert not torch.equal(gptq(static).weight.scale_OG[:, 1:], gptq(wide).weight.scale_OG[:, 1:])
    assert torch.equal(gptq(static).weight.scale_OG[:, 0], gptq(wide).weight.scale_OG[:, 0])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("diagonal", [False, True])
def test_uncorrelated_inputs_leave_nothing_to_compensate(search: str, diagonal: bool) -> None:
    sizes_I = random_moment(64).diagonal() if diagonal else torch.full((64,), 2.7, dtype=torch.float64)
    case = problem(random_weight(11, 64), torch.diag(sizes_I), bits=3, group_size=16, search=search)
    for group_grids in ("dynamic", "static"):
        solution = gptq(replace(case, grid=replace(case.grid, group_grids=group_grids)))
        assert solution.loss == pytest.approx(solution.rtn_loss, rel=1e-12)
        if search in ("minmax", "mse"):
            nearest = rtn(case)
            assert torch.equal(solution.weight.codes_OI, nearest.weight.codes_OI)
            assert torch.equal(solution.weight.scale_OG, nearest.weight.scale_OG)


@pytest.mark.parametrize("order", ["activation", "min_pivot"])
def test_an_order_is_permute_solve_and_permute_back(order: str) -> None:
    weight_OI, moment_II = random_weight(8, 54), random_moment(54)
    places = slow_order(moment_II, order, group_size=-1)
    ordered = gptq(problem(weight_OI, moment_II, order=order, search="pivot"))
    permuted = gptq(problem(weight_OI[:, places], moment_II[places][:, places], order="natural", search="pivot"))
    assert torch.equal(ordered.weight.codes_OI[:, places], permuted.weight.codes_OI)
    assert torch.equal(ordered.weight.scale_OG, permuted.weight.scale_OG)


@pytest.mark.parametrize("group_grids", ["dynamic", "static"])
def test_the_group_aware_order_is_permute_solve_and_permute_back(group_grids: str) -> None:
    weight_OI, moment_II = random_weight(8, 96), random_moment(96)
    places = slow_order(moment_II, "group_aware", group_size=16)
    groups = [place // 16 for place in places[::16]]
    ordered = gptq(problem(weight_OI, moment_II, group_size=16, group_grids=group_grids, order="group_aware"))
    permuted = gptq(
        problem(
            weight_OI[:, places],
            moment_II[places][:, places],
            group_size=16,
            group_grids=group_grids,
            order="natural",
        )
    )
    assert torch.equal(ordered.weight.codes_OI[:, places], permuted.weight.codes_OI)
    assert torch.equal(ordered.weight.scale_OG[:, groups], permuted.weight.scale_OG)
    assert ordered.weight.group_index_I is None


def test_static_grids_do_not_depend_on_the_order() -> None:
    weight_OI, moment_II = random_weight(8, 96), random_moment(96)
    scales = [
        gptq(problem(weight_OI, moment_II, group_size=16, group_grids="static", order=order, search="mse"))
        for order in ("natural", "activation", "group_aware", "min_pivot")
    ]
    for solution in scales[1:]:
        assert torch.equal(solution.weight.scale_OG, scales[0].weight.scale_OG)


@pytest.mark.parametrize("search", SEARCHES)
def test_rows_do_not_influence_each_other(search: str) -> None:
    weight_OI, moment_II = random_weight(12, 64), random_moment(64)
    case = problem(weight_OI, moment_II, bits=3, symmetric=False, group_size=16, search=search)
    whole = gptq(case).rows(4, 9)
    part = gptq(replace(case, weight_OI=weight_OI[4:9]))
    assert torch.equal(whole.weight.codes_OI, part.weight.codes_OI)
    assert torch.equal(whole.weight.scale_OG, part.weight.scale_OG)
    torch.testing.assert_close(whole.row_loss_O, part.row_loss_O, rtol=1e-12, atol=0)
    assert torch.equal(whole.row_clipped_O, part.row_clipped_O)


@pytest.mark.parametrize("search", ["minmax", "walk"])
def test_chunks_of_rows_do_not_change_the_result(search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(random_weight(11, 48), random_moment(48), bits=3, group_size=16, search=search)
    whole = gptq(case)
    monkeypatch.setattr(gptq_module, "_ROWS", 3)
    chunked = gptq(case)
    assert torch.equal(whole.weight.codes_OI, chunked.weight.codes_OI)
    assert torch.equal(whole.weight.scale_OG, chunked.weight.scale_OG)
    assert torch.equal(whole.row_clipped_O, chunked.row_clipped_O)


def test_two_columns_by_brute_force() -> None:
    """The walk is the nearest-plane solution; only in the mean it lies between the best codes and rounding."""
    losses = torch.zeros(3, dtype=torch.float64)
    for seed in range(100):
        weight_OI, moment_II = random_weight(1, 2, seed=seed), random_moment(2, seed=seed)
        solution = gptq(problem(weight_OI, moment_II, bits=3, order="natural", damp_ratio=1e-9))
        scale, levels = solution.weight.scale_OG.double(), torch.arange(8, dtype=torch.float64) - 4
        pairs_PI = torch.cartesian_prod(levels, levels) * scale
        cost_P = _cost(pairs_PI - weight_OI, moment_II)
        first = int(((weight_OI[0, 0] - levels * scale[0, 0]).square()).argmin())
        nearest_plane = first * 8 + int(cost_P.reshape(8, 8)[first].argmin())
        found = solution.weight.codes_OI[0].tolist()
        assert found[0] * 8 + found[1] == nearest_plane
        rounded = ((weight_OI / scale).round() + 4).clamp(0, 7).to(torch.int64)[0].tolist()
        assert solution.loss >= float(cost_P.min()) / float(solution.row_energy_O) - 1e-12
        losses += torch.stack([cost_P.min(), cost_P[nearest_plane], cost_P[rounded[0] * 8 + rounded[1]]])
    assert losses[0] <= losses[1] <= losses[2]


def test_float32_loses_as_much_as_float64() -> None:
    weight_OI, moment_II = random_weight(64, 256), random_moment(256)
    for search in ("minmax", "walk"):
        case = problem(weight_OI.float(), moment_II.float(), bits=4, group_size=64, search=search)
        single = gptq(replace(case, settings=replace(case.settings, dtype=torch.float32)))
        assert single.loss == pytest.approx(gptq(case).loss, rel=0.01)
        assert single.clip_fraction == pytest.approx(gptq(case).clip_fraction, abs=0.002)


def test_compensation_and_the_walked_grid_pay_on_correlated_inputs() -> None:
    weight_OI, moment_II = random_weight(64, 128), random_moment(128)
    losses = {
        search: gptq(problem(weight_OI, moment_II, bits=3, group_size=32, search=search)).loss for search in SEARCHES
    }
    nearest = rtn(problem(weight_OI, moment_II, bits=3, group_size=32, search="minmax")).loss
    assert losses["minmax"] < 0.8 * nearest
    assert losses["walk"] <= min(losses["minmax"], losses["pivot"])


def test_the_walked_grid_costs_no_more_than_the_one_it_starts_from() -> None:
    """In the first group, and in the second one wherever the first came out the same."""
    weight_OI, moment_II = random_weight(400, 32), random_moment(32)
    damped_II = moment_II + 0.01 * float(moment_II.diagonal().mean()) * torch.eye(32, dtype=torch.float64)
    for group_size in (-1, 16):
        pivot, walk = (
            gptq(problem(weight_OI, moment_II, bits=2, group_size=group_size, search=search, order="natural")).weight
            for search in ("pivot", "walk")
        )
        pivot_O, walk_O = (_cost(weight.dequantize().double() - weight_OI, damped_II) for weight in (pivot, walk))
        alike_O = torch.ones(400, dtype=torch.bool)
        if group_size == 16:
            alike_O = (pivot.scale_OG[:, 0] == walk.scale_OG[:, 0]) & (
                pivot.codes_OI[:, :16] == walk.codes_OI[:, :16]
            ).all(dim=1)
        changed_O = alike_O & (pivot.codes_OI != walk.codes_OI).any(dim=1)
        assert bool((walk_O[alike_O] <= pivot_O[alike_O] * (1 + 1e-12)).all())
        assert int(changed_O.sum()) > 5
        assert float(walk_O[changed_O].sum()) < 0.98 * float(pivot_O[changed_O].sum())


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_float16_scales_decode_to_what_the_loss_was_taken_of(solver: str, symmetric: bool) -> None:
    weight_OI, moment_II = random_weight(8, 64) * 0.02, random_moment(64)
    for dtype in (torch.float32, torch.float64):
        case = problem(weight_OI, moment_II, symmetric=symmetric, group_size=16, search="walk", dtype=dtype)
        solution = METHODS[solver].solver(case)
        for scale_dtype in (torch.float16, torch.bfloat16):
            stored = solution.weight.with_scale_dtype(scale_dtype)
            assert torch.equal(stored.dequantize(), solution.weight.dequantize())
        difference_OI = stored.dequantize().to(dtype) - weight_OI.to(dtype)
        # Losses of a float32 solve are good to three digits where the processor multiplies in bfloat16.
        tolerance = 1e-9 if dtype == torch.float64 else 2e-2
        expected_O = _cost(difference_OI, moment_II.to(dtype)).double()
        torch.testing.assert_close(solution.row_loss_O, expected_O, rtol=tolerance, atol=0)
        energy = float(_cost(weight_OI, moment_II).sum())
        assert solution.loss == pytest.approx(float(solution.row_loss_O.sum()) / energy, rel=tolerance)


def test_clipped_weights_are_counted_where_they_stand_when_rounded() -> None:
    weight_OI, moment_II = random_weight(12, 40), random_moment(40)
    case = problem(weight_OI, moment_II, bits=2, search="pivot", order="natural")
    solution = gptq(case)
    scale_O1, places = solution.weight.scale_OG.double(), list(range(40))
    slow = slow_gptq(
        weight_OI,
        moment_II,
        bits=2,
        symmetric=True,
        group_size=-1,
        order=places,
        grids=(scale_O1, solution.weight.zero_point_OG.double()),
    )
    distance_OI = slow.errors_OI * slow.upper_II.diagonal()
    clipped_O = (distance_OI.abs() > 0.5005 * scale_O1.abs()).double().mean(dim=1)
    assert torch.equal(solution.row_clipped_O, clipped_O)
    assert 0 < solution.clip_fraction < 0.5


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_documented_shapes_and_dtypes(weight_dtype: torch.dtype) -> None:
    weight_OI = random_weight(5, 32).to(weight_dtype)
    for method in (method for method in METHODS.values() if method.binary is None):
        solution: LayerSolution = method.solver(
            problem(weight_OI, random_moment(32).float(), bits=3, group_size=16, search="walk", dtype=torch.float32)
        )
        weight = solution.weight
        assert (weight.codes_OI.dtype, weight.codes_OI.shape) == (torch.uint8, (5, 32))
        assert (weight.scale_OG.dtype, weight.scale_OG.shape) == (torch.float32, (5, 2))
        assert (weight.zero_point_OG.dtype, weight.zero_point_OG.shape) == (torch.int32, (5, 2))
        assert weight.codes_OI.is_contiguous()
        assert int(weight.codes_OI.max()) <= 7
        assert (weight.bits, weight.group_size, weight.symmetric) == (3, 16, True)
        vectors = (solution.row_energy_O, solution.row_loss_O, solution.row_rtn_loss_O, solution.row_clipped_O)
        for vector_O in vectors:
            assert (vector_O.dtype, vector_O.shape) == (torch.float64, (5,))


def _cost(rows: torch.Tensor, moment_II: torch.Tensor) -> torch.Tensor:
    return ((rows @ moment_II) * rows).sum(dim=1)
