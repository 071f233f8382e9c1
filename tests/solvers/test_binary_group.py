"""One group in binary codes: the walk, the fitted coefficients, and which walk a row keeps."""

from __future__ import annotations

import pytest
import torch
from support.problems import random_moment, random_weight
from support.slow_binary import slow_columns, slow_fit, slow_levels, slow_walk

from optgptq.solvers.binary_group import CodedGroup, code_group
from optgptq.solvers.factor import reverse_cholesky
from optgptq.solvers.levels import half_precision, levels_of, shape_table, sign_table, uniform_coefficients
from optgptq.solvers.rounding import round_on_grids
from optgptq.solvers.walk import ColumnGrids

GROUPS = [(slice(0, 21), slice(21, 42)), (slice(0, 32), slice(32, 42))]


def factor(num_columns: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a damped moment and its `P`."""
    moment_II = random_moment(num_columns, seed=seed)
    moment_II.diagonal().add_(0.01 * float(moment_II.diagonal().mean()))
    upper_II = reverse_cholesky(moment_II, damp=0.0)
    assert upper_II is not None
    return moment_II, upper_II


def start(bits: int, num_rows: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    alpha_PO = torch.rand(bits, num_rows, generator=generator, dtype=torch.float64).sort(dim=0, descending=True).values
    offset_1O = 0.2 * torch.randn(1, num_rows, generator=generator, dtype=torch.float64)
    return half_precision(torch.cat([alpha_PO, offset_1O]))


def code(
    weight_LO: torch.Tensor,
    upper_LL: torch.Tensor,
    starts: list[torch.Tensor],
    *,
    bits: int,
    refits: int = 0,
    pending_LO: torch.Tensor | None = None,
    column_block: int = 16,
) -> CodedGroup:
    return code_group(
        weight_LO,
        torch.zeros_like(weight_LO) if pending_LO is None else pending_LO,
        upper_LL,
        sign_table(bits, weight_LO),
        starts=starts,
        refits=refits,
        column_block=column_block,
    )


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_costs_of_groups_add_up_to_the_damped_loss(
    bits: int, groups: tuple[slice, slice], dtype: torch.dtype, tolerance: float
) -> None:
    moment_II, upper_II = (values.to(dtype) for values in factor(42))
    weight_IO = random_weight(6, 42).T.to(dtype)
    error_IO, cost_O = torch.zeros_like(weight_IO), torch.zeros(6, dtype=dtype)
    for index, columns in enumerate(groups):
        pending_LO = upper_II[: columns.start, columns].T @ error_IO[: columns.start]
        start_BO = start(bits, 6, seed=index).to(dtype)
        coded = code(weight_IO[columns], upper_II[columns, columns], [start_BO], bits=bits, pending_LO=pending_LO)
        error_IO[columns] = coded.error_LO
        whitened_LO = upper_II[:, columns].T @ error_IO
        torch.testing.assert_close(coded.weighted_LO, whitened_LO, rtol=0, atol=50 * tolerance)
        torch.testing.assert_close(coded.cost(), whitened_LO.square().sum(dim=0), rtol=tolerance, atol=0)
        cost_O += coded.cost()
    damped_O = ((moment_II @ error_IO) * error_IO).sum(dim=0)
    torch.testing.assert_close(cost_O, damped_O, rtol=10 * tolerance, atol=0)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("groups", GROUPS)
def test_the_walk_is_gptq_on_the_levels_of_each_group(bits: int, groups: tuple[slice, slice]) -> None:
    moment_II, upper_II = factor(42, seed=bits)
    weight_IO, error_IO = random_weight(5, 42, seed=bits).T, torch.zeros(42, 5, dtype=torch.float64)
    starts = [start(bits, 5, seed=index) for index in range(2)]
    codes_IO, cost_O = torch.empty(42, 5, dtype=torch.uint8), torch.zeros(5, dtype=torch.float64)
    for columns, start_BO in zip(groups, starts, strict=True):
        pending_LO = upper_II[: columns.start, columns].T @ error_IO[: columns.start]
        coded = code(weight_IO[columns], upper_II[columns, columns], [start_BO], bits=bits, pending_LO=pending_LO)
        error_IO[columns], codes_IO[columns] = coded.error_LO, coded.codes_LO
        cost_O += coded.cost()
    for row in range(5):
        levels_I = [
            slow_levels(start_BO[:, row])
            for columns, start_BO in zip(groups, starts, strict=True)
            for _ in range(columns.stop - columns.start)
        ]
        slow = slow_walk(weight_IO[:, row], moment_II, levels_I)
        assert torch.equal(codes_IO[:, row].long(), slow.codes_I)
        torch.testing.assert_close(error_IO[:, row], slow.error_I, rtol=1e-12, atol=1e-12)
        assert float(cost_O[row]) == pytest.approx(float(slow.paid_I.square().sum()), rel=1e-10)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_uniform_grid_gives_the_codes_of_uniform_gptq(bits: int, dtype: torch.dtype) -> None:
    _, upper_LL = (values.to(dtype) for values in factor(70))
    weight_LO, pending_LO = random_weight(40, 70).T.to(dtype), random_weight(40, 70, seed=3).T.to(dtype)
    generator = torch.Generator().manual_seed(0)
    # Scales of eight significant bits: float16 holds the coefficients that belong to them.
    scale_O = (torch.rand(40, generator=generator) + 0.3).bfloat16().to(dtype)
    zero_point_O = torch.randint(0, 2**bits, (40,), generator=generator).to(dtype)
    start_BO = uniform_coefficients(scale_O, zero_point_O, bits)
    assert torch.equal(half_precision(start_BO), start_BO)
    coded = code(weight_LO, upper_LL, [start_BO], bits=bits, pending_LO=pending_LO)
    grids = ColumnGrids(
        scale_GR=scale_O[None], zero_point_GR=zero_point_O[None], grid_of_column=[0] * 70, max_code=2**bits - 1
    )
    rounded = round_on_grids(weight_LO, pending_LO, upper_LL, grids, column_block=16, backend="torch")
    # The first plane is the largest: the bits stand in the other order.
    planes = [coded.codes_LO >> plane & 1 for plane in range(bits)]
    uniform_LO = sum(plane_LO << (bits - 1 - plane) for plane, plane_LO in enumerate(planes))
    assert torch.equal(uniform_LO, rounded.codes_LO)
    torch.testing.assert_close(coded.error_LO, rounded.error_LO)
    torch.testing.assert_close(coded.cost(), rounded.weighted_LO.square().sum(dim=0))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_coefficients_of_a_uniform_grid_give_its_levels(bits: int, zero_point: int) -> None:
    scale_O, zero_point_O = torch.tensor([0.25, 3.0]).double(), torch.tensor([zero_point, 2**bits - 1]).double()
    coefficient_BO = uniform_coefficients(scale_O, zero_point_O, bits)
    level_KO = levels_of(sign_table(bits, scale_O), coefficient_BO).sort(dim=0).values
    expected_KO = scale_O * (torch.arange(2**bits).double()[:, None] - zero_point_O)
    assert torch.equal(level_KO, expected_KO)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_coefficients_are_the_least_squares_fit_in_the_damped_metric(bits: int, seed: int) -> None:
    _, upper_LL = factor(45, seed=seed)
    weight_LO, pending_LO = random_weight(30, 45, seed=seed).T, random_weight(30, 45, seed=seed + 9).T
    first = code(weight_LO, upper_LL, [start(bits, 30)], bits=bits, pending_LO=pending_LO)
    # Where planes agree in every column, one of many fits would be compared with another.
    columns = [slow_columns(codes_L, bits) for codes_L in first.codes_LO.T]
    kept = [row for row, columns_LB in enumerate(columns) if int(torch.linalg.matrix_rank(columns_LB)) == bits + 1]
    assert len(kept) > 25
    weight_LO, pending_LO, start_BO = weight_LO[:, kept], pending_LO[:, kept], start(bits, 30)[:, kept]
    first = code(weight_LO, upper_LL, [start_BO], bits=bits, pending_LO=pending_LO)
    # `|e P + pending|^2` is the loss of the weights as they stand, under the block `P P^T`.
    current_LO = weight_LO + torch.linalg.solve_triangular(upper_LL.T, pending_LO, upper=False)
    fitted_BO = torch.stack(
        [slow_fit(current_LO[:, place], columns[row], upper_LL @ upper_LL.T) for place, row in enumerate(kept)],
        dim=1,
    )
    refitted = code(weight_LO, upper_LL, [start_BO], bits=bits, pending_LO=pending_LO, refits=1)
    walked = code(weight_LO, upper_LL, [fitted_BO], bits=bits, pending_LO=pending_LO)
    takes_O = walked.cost() < first.cost()
    assert int(takes_O.sum()) > 15
    assert torch.equal(refitted.cost(), torch.minimum(first.cost(), walked.cost()))
    assert torch.equal(refitted.coefficient_BO, torch.where(takes_O, half_precision(fitted_BO), start_BO))
    assert torch.equal(refitted.codes_LO, torch.where(takes_O, walked.codes_LO, first.codes_LO))
    assert torch.equal(refitted.error_LO, torch.where(takes_O, walked.error_LO, first.error_LO))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_never_costs_more_than_with_any_start_or_fewer_fits(bits: int, dtype: torch.dtype) -> None:
    _, upper_LL = (values.to(dtype) for values in factor(33))
    weight_LO = random_weight(50, 33).T.to(dtype)
    starts = [start(bits, 50, seed=seed).to(dtype) for seed in range(3)]
    alone = torch.stack([code(weight_LO, upper_LL, [start_BO], bits=bits).cost() for start_BO in starts])
    together = code(weight_LO, upper_LL, starts, bits=bits)
    assert torch.equal(together.cost(), alone.amin(dim=0))
    assert len(alone.argmin(dim=0).unique()) == 3
    for row, best in enumerate(alone.argmin(dim=0).tolist()):
        assert torch.equal(together.coefficient_BO[:, row], starts[best][:, row])
    costs = [together.cost()]
    for refits in (1, 2, 3, 6):
        costs.append(code(weight_LO, upper_LL, starts, bits=bits, refits=refits).cost())
        assert bool((costs[-1] <= costs[-2]).all())
    assert float(costs[3].sum()) < 0.9 * float(costs[0].sum())


def test_shapes_of_rows_are_walked_on_their_own_levels() -> None:
    _, upper_LL = factor(20)
    weight_LO = random_weight(3, 20).T
    steps_PO = torch.tensor([[2.0, 5.0, 4.0], [1.0, 3.0, 1.0]]).double()
    start_BO = torch.tensor([[0.75, 0.25, -0.5], [0.0, 0.125, -0.25]]).double()
    coded = code_group(
        weight_LO,
        torch.zeros_like(weight_LO),
        upper_LL,
        shape_table(steps_PO),
        starts=[start_BO],
        refits=0,
        column_block=16,
    )
    planes_PO = steps_PO * start_BO[0] / 2
    plain = code(weight_LO, upper_LL, [torch.cat([planes_PO, start_BO[1:]])], bits=2)
    assert torch.equal(coded.codes_LO, plain.codes_LO)
    torch.testing.assert_close(coded.error_LO, plain.error_LO)


@pytest.mark.parametrize("column_block", [1, 7, 16, 64])
def test_the_column_block_changes_nothing_and_inputs_stay(column_block: int) -> None:
    _, upper_LL = factor(50)
    weight_LO, pending_LO = random_weight(12, 50).T, random_weight(12, 50, seed=1).T
    before = weight_LO.clone(), pending_LO.clone(), upper_LL.clone()
    coded, whole = (
        code(weight_LO, upper_LL, [start(3, 12)], bits=3, refits=2, pending_LO=pending_LO, column_block=block)
        for block in (column_block, 50)
    )
    assert torch.equal(coded.codes_LO, whole.codes_LO)
    assert torch.equal(coded.coefficient_BO, whole.coefficient_BO)
    for old, new in zip(before, (weight_LO, pending_LO, upper_LL), strict=True):
        assert torch.equal(old, new)
