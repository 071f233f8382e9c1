"""The shape of a row: cheapest over its groups, and never dearer than uniform grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.binary_problems import binary_problem, stored
from support.problems import problem, random_moment, random_weight
from support.slow_binary import row_losses

from optgptq.grids.binary_search import search_codes
from optgptq.grids.binary_settings import BinarySettings
from optgptq.grids.codebook import codebook
from optgptq.grids.search import ErrorPrice, find_grids
from optgptq.grids.settings import GridSettings
from optgptq.solvers import binary_shapes, gptq
from optgptq.solvers.binary import solve
from optgptq.solvers.binary_shapes import choose_shapes, find_shapes, row_shapes
from optgptq.solvers.levels import half_precision

FACTORS = (1.0, 0.85, 0.6, 1.2)
EVERY_FACTOR = BinarySettings().factors


def groups(num_groups: int, num_columns: int, num_rows: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights `[G, L, O]` and prices `[G, L]`."""
    weights = [random_weight(num_rows, num_columns, seed=seed + group).T for group in range(num_groups)]
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(weights), torch.rand(num_groups, num_columns, generator=generator, dtype=torch.float64) + 0.1


def slow_cost(weight_L: torch.Tensor, price_L: torch.Tensor, levels: torch.Tensor) -> float:
    return float((price_L * (weight_L[:, None] - levels).abs().amin(dim=1).square()).sum())


def slow_shape_cost(
    weight_L: torch.Tensor, price_L: torch.Tensor, steps: list[int], scale: float, centre: float
) -> float:
    """Return what nearest levels cost, with coefficients as float16 holds them."""
    scale, centre = (float(half_precision(torch.tensor(value, dtype=torch.float64))) for value in (scale, centre))
    signs_KP = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * len(steps)).reshape(
        -1, len(steps)
    )
    levels_K = centre + scale * (signs_KP @ torch.tensor(steps, dtype=torch.float64)) / 2
    return slow_cost(weight_L, price_L, levels_K)


def slow_grid_cost(weight_GLO: torch.Tensor, price_GL: torch.Tensor, row: int, bits: int) -> float:
    """Return what a row costs on the uniform grids of its groups."""
    grid, total = GridSettings(bits=bits, symmetric=False, group_size=-1, search="pivot"), 0.0
    for columns_LO, price_L in zip(weight_GLO, price_GL, strict=True):
        price = ErrorPrice(price_L, price_L.diag())
        scale_1O, zero_1O = find_grids(columns_LO[:, row : row + 1], price, grid, count=1)
        scale, zero = float(scale_1O), float(zero_1O)
        steps = [2**plane for plane in range(bits)]
        total += slow_shape_cost(columns_LO[:, row], price_L, steps, scale, scale * ((2**bits - 1) / 2 - zero))
    return total


def test_the_shape_of_a_row_is_the_cheapest_over_all_groups() -> None:
    codes = codebook(2, 4)
    weight_GLO, price_GL = groups(3, 12, 5)
    shape_O = find_shapes(weight_GLO, price_GL, codes, FACTORS, backend="torch")
    total_OS = torch.zeros(5, len(codes.steps_SP), dtype=torch.float64)
    for shape in range(len(codes.steps_SP)):
        given_O = torch.full((5,), shape)
        for columns_LO, price_L in zip(weight_GLO, price_GL, strict=True):
            total_OS[:, shape] += search_codes(columns_LO, price_L, codes, FACTORS, shape_O=given_O).cost_O
    assert torch.equal(shape_O, total_OS.argmin(dim=1))
    assert len(shape_O.unique()) > 1


@pytest.mark.parametrize("num_at_once", [1, 3, 1000])
def test_chunks_of_rows_do_not_change_the_shapes(num_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_GLO, price_GL = groups(2, 16, 8)
    whole_O = find_shapes(weight_GLO, price_GL, codebook(2, 4), FACTORS, backend="torch")
    monkeypatch.setattr(binary_shapes, "_ROWS", num_at_once)
    assert torch.equal(find_shapes(weight_GLO, price_GL, codebook(2, 4), FACTORS, backend="torch"), whole_O)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    widths=st.sampled_from([(2, 3), (2, 4), (3, 4), (3, 5), (4, 5)]),
    num_columns=st.integers(2, 24),
    num_groups=st.integers(1, 3),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_no_row_costs_more_than_on_uniform_grids(
    seed: int, widths: tuple[int, int], num_columns: int, num_groups: int, size: float
) -> None:
    """What each row costs at nearest levels, with the codes that the search finds for its shape or uniform grids."""
    codes, bits = codebook(*widths), widths[0]
    weight_GLO, price_GL = groups(num_groups, num_columns, 4, seed=seed)
    weight_GLO = size * weight_GLO
    grid = GridSettings(bits=bits, symmetric=False, group_size=-1, search="pivot")
    shapes = choose_shapes(weight_GLO, price_GL, codes, FACTORS, grid=grid, backend="torch")
    is_uniform_O = shapes.is_uniform()
    for row in range(4):
        uniform = slow_grid_cost(weight_GLO, price_GL, row, bits)
        if is_uniform_O[row]:
            assert shapes.steps_OP[row].tolist() == [2**plane for plane in reversed(range(bits))]
            continue
        own = 0.0
        for columns_LO, price_L in zip(weight_GLO, price_GL, strict=True):
            found = search_codes(columns_LO, price_L, codes, FACTORS, shape_O=shapes.index_O)
            start_B = shapes.start(found, codes)[:, row].tolist()
            own += slow_shape_cost(columns_LO[:, row], price_L, shapes.steps_OP[row].tolist(), *start_B)
        assert own <= uniform * (1 + 1e-9)


def test_uniform_shapes_are_taken_where_the_search_overprices_them() -> None:
    """Most rows of weights on a uniform grid of even steps ask for it, whatever the histogram says."""
    codes, generator = codebook(2, 4), torch.Generator().manual_seed(0)
    codes_GLO = torch.randint(0, 4, (2, 64, 40), generator=generator).double()
    # Steps of four whole numbers at the full range less two: levels half-way between numbers.
    weight_GLO = 0.25 * (codes_GLO - 1) + 0.02 * torch.randn(2, 64, 40, generator=generator, dtype=torch.float64)
    price_GL = torch.ones(2, 64, dtype=torch.float64)
    grid = GridSettings(bits=2, symmetric=False, group_size=-1, search="pivot")
    chosen = choose_shapes(weight_GLO, price_GL, codes, EVERY_FACTOR, grid=grid, backend="torch")
    searched = choose_shapes(weight_GLO, price_GL, codes, EVERY_FACTOR, grid=None, backend="torch")
    assert int(chosen.is_uniform().sum()) >= int(searched.is_uniform().sum())
    assert int(chosen.is_uniform().sum()) > 20


@pytest.mark.parametrize("bits", [2, 3])
def test_steps_have_nothing_in_common(bits: int) -> None:
    codes = codebook(bits, 5)
    shapes = row_shapes(torch.arange(len(codes.steps_SP)), codes)
    assert torch.equal(shapes.steps_OP * shapes.unit_O[:, None], codes.steps_SP)
    for steps in shapes.steps_OP.tolist():
        assert not any(all(step % common == 0 for step in steps) for common in range(2, 32))
    assert int(shapes.is_uniform().sum()) == 31 // (2**bits - 1)


def with_steps(weight_OI: torch.Tensor, moment_II: torch.Tensor, **binary: Any) -> Any:
    settings = {"coefficients": "steps", "refits": 0, "sweeps": 0, "scales": (0.3, 1.3, 0.1), **binary}
    return binary_problem(weight_OI, moment_II, bits=3, binary=settings)


def test_rows_of_uniform_shape_walk_their_uniform_grid_too() -> None:
    """In the first group, where both methods stand on the same weights: such rows cost no more than with GPTQ."""
    weight_OI, moment_II = random_weight(60, 32), random_moment(32)
    # Uniform levels with noise: many rows ask for the uniform shape.
    weight_OI[:40] = (weight_OI[:40] * 2).round().clamp(-3, 4) / 2 + 0.02 * weight_OI[:40]
    damped_II = moment_II + 0.01 * float(moment_II.diagonal().mean()) * torch.eye(32, dtype=torch.float64)
    weight = stored(solve(with_steps(weight_OI, moment_II)))
    is_uniform_O = (weight.coefficients.tensors()[0] == torch.tensor([4, 2, 1])).all(dim=1)
    assert 10 < int(is_uniform_O.sum()) < 60
    uniform = problem(weight_OI, moment_II, bits=3, symmetric=False, search="pivot", backend="torch", damp_ratio=0.01)
    costs = [
        row_losses((weight_OI - dense_OI.double()).T, damped_II)
        for dense_OI in (weight.dequantize(), gptq.solve(uniform).weight.dequantize())
    ]
    assert bool((costs[0] <= costs[1] * (1 + 1e-3))[is_uniform_O].all())


def test_no_row_is_priced_above_its_uniform_grids() -> None:
    """Of whole solutions: the nearest levels that the search finds for each row's shape, on weights nothing moved."""
    weight_OI, moment_II = random_weight(30, 48), random_moment(48)
    solved = stored(solve(with_steps(weight_OI, moment_II, weighting="none")))
    price_L = torch.ones(48, dtype=torch.float64)
    steps_OP, codes = solved.coefficients.tensors()[0].long(), codebook(3, 4)
    scales = BinarySettings(scales=(0.3, 1.3, 0.1)).factors
    reduced_SP = row_shapes(torch.arange(len(codes.steps_SP)), codes).steps_OP
    checked = 0
    for row, steps_P in enumerate(steps_OP):
        if steps_P.tolist() == [4, 2, 1]:
            continue
        own = float("inf")
        for shape in (reduced_SP == steps_P).all(dim=1).nonzero().flatten():
            columns_LO = weight_OI[row][:, None]
            found = search_codes(columns_LO, price_L, codes, scales, shape_O=shape[None])
            start_B = row_shapes(shape[None], codes).start(found, codes)[:, 0].tolist()
            own = min(own, slow_shape_cost(weight_OI[row], price_L, steps_P.tolist(), *start_B))
        assert own <= slow_grid_cost(weight_OI.T[None], price_L[None], row, 3) * (1 + 1e-9)
        checked += 1
    assert checked > 5
