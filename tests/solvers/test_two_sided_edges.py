"""Output moments that say little or nothing, and the wave by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import problem, random_moment, random_weight
from support.slow_two_sided import output_moments

from optgptq.errors import NumericalError
from optgptq.solvers import LayerProblem, gptq, two_sided
from optgptq.solvers.coupling import coupling, ranks
from optgptq.solvers.walk import ColumnGrids
from optgptq.solvers.wavefront import CoupledRows, round_wavefront

HEADS, HEAD_SIZE, COLUMNS = 3, 6, 24


def coupled(
    output_moment_NDD: torch.Tensor | None, *, group_grids: str = "dynamic", **settings: object
) -> LayerProblem:
    case = problem(
        random_weight(HEADS * HEAD_SIZE, COLUMNS),
        random_moment(COLUMNS),
        bits=3,
        group_size=8,
        search="walk",
        group_grids=group_grids,
        **settings,
    )
    return replace(case, output_moment_NDD=output_moment_NDD)


def test_without_an_output_moment_it_is_gptq() -> None:
    case = coupled(None)
    solution = two_sided.solve(case)
    assert torch.equal(solution.weight.codes_OI, gptq.solve(case).weight.codes_OI)
    assert solution.notes == ()
    assert solution.coupled is None


@pytest.mark.parametrize("name", ["identity", "diagonal", "zero", "nearly diagonal"])
def test_rows_that_do_not_meet_are_solved_one_sided_and_it_is_said(name: str) -> None:
    identity_DD = torch.eye(HEAD_SIZE, dtype=torch.float64)
    moment_DD = {
        "identity": identity_DD,
        "diagonal": torch.diag(torch.rand(HEAD_SIZE, generator=torch.Generator().manual_seed(0)).double() + 0.1),
        "zero": torch.zeros_like(identity_DD),
        "nearly diagonal": identity_DD + 1e-5,
    }[name]
    case = coupled(moment_DD.repeat(HEADS, 1, 1))
    solution = two_sided.solve(case)
    assert torch.equal(solution.weight.codes_OI, gptq.solve(case).weight.codes_OI)
    assert torch.equal(solution.weight.scale_OG, gptq.solve(case).weight.scale_OG)
    assert solution.coupled is None
    assert solution.notes == (
        "3 of 3 heads were solved without their output moment, because it is zero or nearly diagonal",
    )


@pytest.mark.parametrize("row_mode", ["rows", "wavefront"])
@pytest.mark.parametrize("group_grids", ["dynamic", "static"])
def test_a_head_that_is_not_coupled_is_solved_one_sided_beside_those_that_are(group_grids: str, row_mode: str) -> None:
    moment_NDD = output_moments(HEADS, HEAD_SIZE)
    moment_NDD[1] = torch.diag(moment_NDD[1].diagonal())
    case = coupled(moment_NDD, group_grids=group_grids, row_mode=row_mode)
    solution, one_sided = two_sided.solve(case), gptq.solve(case)
    same_N = (solution.weight.codes_OI == one_sided.weight.codes_OI).view(HEADS, -1).all(dim=1)
    assert same_N.tolist() == [False, True, False]
    torch.testing.assert_close(solution.row_loss_O[HEAD_SIZE:-HEAD_SIZE], one_sided.row_loss_O[HEAD_SIZE:-HEAD_SIZE])
    assert solution.notes == (
        "1 of 3 heads were solved without their output moment, because it is zero or nearly diagonal",
    )


def test_too_low_a_rank_is_not_used() -> None:
    moment_NDD = output_moments(HEADS, HEAD_SIZE)
    moment_NDD[0] = output_moments(1, HEAD_SIZE, num_tokens=2)[0]
    moment_NDD[2] = output_moments(1, HEAD_SIZE, num_tokens=3)[0]
    assert ranks(moment_NDD.float()).tolist() == [2, 6, 3]
    case = coupled(moment_NDD.float())
    solution, one_sided = two_sided.solve(case), gptq.solve(case)
    same_N = (solution.weight.codes_OI == one_sided.weight.codes_OI).view(HEADS, -1).all(dim=1)
    assert same_N.tolist() == [True, False, False]
    assert solution.notes == (
        "1 of 3 heads were solved without their output moment, "
        "because its rank is less than half of the head dimension",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row_mode", ["rows", "wavefront"])
def test_singular_moments_are_solved_and_nothing_is_changed(row_mode: str, dtype: torch.dtype) -> None:
    moment_NDD = output_moments(HEADS, HEAD_SIZE, num_tokens=4)
    case = coupled(moment_NDD, row_mode=row_mode, row_block=-1, dtype=dtype)
    case = replace(case, input_moment_II=random_moment(COLUMNS, num_tokens=3))
    before = case.weight_OI.clone(), case.input_moment_II.clone(), moment_NDD.clone()
    solution = two_sided.solve(case)
    assert solution.coupled is not None
    assert 0 < solution.coupled.loss < solution.coupled.rtn_loss
    assert torch.equal(case.weight_OI, before[0])
    assert torch.equal(case.input_moment_II, before[1])
    assert torch.equal(moment_NDD, before[2])


@pytest.mark.parametrize("row_mode", ["rows", "wavefront"])
def test_dead_rows_and_columns_leave_the_others_alone(row_mode: str) -> None:
    moment_NDD = output_moments(HEADS, HEAD_SIZE)
    dead_rows, dead_columns = [1, 4], [3, 17]
    moment_NDD[:, dead_rows] = 0
    moment_NDD[:, :, dead_rows] = 0
    case = coupled(moment_NDD, group_grids="static", row_mode=row_mode)
    case.weight_OI[:, dead_columns] *= 0.1
    case.weight_OI[HEAD_SIZE + 2] = 0
    moment_II = case.input_moment_II.clone()
    moment_II[dead_columns] = 0
    moment_II[:, dead_columns] = 0
    case = replace(case, input_moment_II=moment_II)
    solution, one_sided = two_sided.solve(case), gptq.solve(case)
    codes_NDI = solution.weight.codes_OI.view(HEADS, HEAD_SIZE, -1)
    assert torch.equal(codes_NDI[:, dead_rows], one_sided.weight.codes_OI.view_as(codes_NDI)[:, dead_rows])
    live = [row for row in range(HEAD_SIZE) if row not in dead_rows]
    removed = two_sided.solve(
        replace(
            case,
            weight_OI=case.weight_OI.view(HEADS, HEAD_SIZE, -1)[:, live].flatten(0, 1),
            output_moment_NDD=moment_NDD[:, live][:, :, live],
        )
    )
    assert torch.equal(codes_NDI[:, live], removed.weight.codes_OI.view(HEADS, len(live), -1))
    scale_OI = solution.weight.scale_OG.double().repeat_interleave(8, dim=1)[:, dead_columns]
    rounded_OI = ((case.weight_OI[:, dead_columns] / scale_OI).round() + 4).clamp(0, 7).to(torch.uint8)
    nearest_NDI = rounded_OI.view(HEADS, HEAD_SIZE, -1)[:, dead_rows]
    assert torch.equal(codes_NDI[:, dead_rows][:, :, dead_columns], nearest_NDI)
    assert solution.num_dead_inputs == 2
    assert bool(torch.isfinite(solution.row_loss_O).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_moment_that_is_not_finite_stops_the_solve(value: float) -> None:
    moment_NDD = output_moments(HEADS, HEAD_SIZE)
    moment_NDD[2, 0, 1] = value
    with pytest.raises(NumericalError) as caught:
        two_sided.solve(coupled(moment_NDD))
    assert str(caught.value) == (
        "linear: output moment: expected finite values, found NaN or infinity. Check the model's weights and the "
        "calibration text; an overflow in float16 is the usual cause."
    )


def test_an_input_moment_that_is_not_finite_stops_the_solve() -> None:
    case = coupled(output_moments(HEADS, HEAD_SIZE))
    case.input_moment_II[3, 3] = float("nan")
    with pytest.raises(NumericalError, match="linear: input moment"):
        two_sided.solve(case)


def test_raised_damping_of_a_head_is_told() -> None:
    moment_NDD = output_moments(HEADS, HEAD_SIZE)
    lowest = float(torch.linalg.eigvalsh(moment_NDD[1])[0])
    size = float(moment_NDD[1].diagonal().mean())
    moment_NDD[1].diagonal().sub_(lowest + 0.02 * size)
    solution = two_sided.solve(coupled(moment_NDD))
    assert solution.notes == (
        "damping was raised from 0.01 to as much as 0.03 of the mean diagonal in 1 of 3 heads, because the output "
        "moment could not be factored",
    )


def test_a_head_that_no_damping_repairs_is_named() -> None:
    moment_NDD = output_moments(HEADS, HEAD_SIZE)
    moment_NDD[1, 2, 3] = moment_NDD[1, 3, 2] = 1e6
    with pytest.raises(NumericalError, match="linear: output moment of head 1: expected a matrix that damping makes"):
        two_sided.solve(coupled(moment_NDD))


@pytest.mark.parametrize("order", ["activation", "min_pivot"])
def test_orders_that_scatter_groups_need_static_grids(order: str) -> None:
    with pytest.raises(ValueError, match="it needs static grids"):
        two_sided.solve(coupled(output_moments(HEADS, HEAD_SIZE), order=order))


def test_the_coupling_is_what_stands_beside_the_diagonal() -> None:
    moment_NDD = torch.stack([torch.ones(4, 4), torch.eye(4), torch.zeros(4, 4)])
    torch.testing.assert_close(coupling(moment_NDD), torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64).sqrt())


@pytest.mark.parametrize("columns", [1, 4, 6, 11, 64])
def test_the_width_of_a_wave_changes_nothing(columns: int) -> None:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = CoupledRows(
        weight_LBN=normal(11, 6, 2),
        pending_LBN=normal(11, 6, 2),
        earlier_LBN=normal(11, 6, 2),
        upper_LL=normal(11, 11).triu(1) + torch.diag(1 + normal(11).abs()),
        output_NBB=normal(2, 6, 6).triu(1) + torch.diag_embed(1 + normal(2, 6).abs()),
    )
    grids = ColumnGrids(
        scale_GR=0.1 + normal(2, 12).abs(),
        zero_point_GR=torch.full((2, 12), 4.0, dtype=torch.float64),
        grid_of_column=[0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1],
        max_code=7,
    )
    wave = round_wavefront(rows, grids, columns=columns)
    own_LBN = rows.pending_LBN + torch.einsum("kbn,kl->lbn", wave.error_LBN, rows.upper_LL)
    coupled_LBN = rows.earlier_LBN + torch.einsum("lcn,ncb->lbn", own_LBN, rows.output_NBB)
    torch.testing.assert_close(wave.own_LBN, own_LBN)
    torch.testing.assert_close(wave.coupled_LBN, coupled_LBN)
    pivots_LBN = rows.upper_LL.diagonal()[:, None, None] * rows.output_NBB.diagonal(dim1=1, dim2=2).T
    scale_LBN = grids.scale_GR[list(grids.grid_of_column)].view(11, 6, 2)
    level_LBN = rows.weight_LBN - wave.error_LBN
    stood_LBN = level_LBN + wave.coupled_LBN / pivots_LBN
    torch.testing.assert_close(level_LBN, (stood_LBN / scale_LBN).round().clamp(-4, 3) * scale_LBN)
