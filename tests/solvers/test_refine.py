"""Refinement against literal slow versions, and what it must never do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import problem, random_moment, random_weight
from support.slow_refine import head_losses, random_affine, row_losses, slow_descent
from support.slow_two_sided import output_moments

from optgptq.grids.affine import storable_scale
from optgptq.solvers import gptq
from optgptq.solvers.descend import CodeDescent
from optgptq.solvers.problem import SolverSettings
from optgptq.solvers.refine import refine, refine_two_sided
from optgptq.solvers.refit_scales import normal_equations, scale_change

HEADS, HEAD_SIZE = 3, 5


def test_one_sweep_takes_the_best_level_of_each_column_in_turn() -> None:
    num_rows, num_columns, group_size = 3, 85, 20
    target_OI, moment_II = random_weight(num_rows, num_columns), random_moment(num_columns)
    moment_II[17], moment_II[:, 17] = 0, 0
    weight = random_affine(target_OI, bits=2, group_size=group_size, symmetric=False)
    group_of_column = [column // group_size for column in range(num_columns)]
    scale_GR, zero_point_GR = weight.scale_OG.T.double(), weight.zero_point_OG.T.double()
    steps_IR = weight.codes_OI.T.double() - zero_point_GR[group_of_column]
    limits = {"lowest_GR": -zero_point_GR, "highest_GR": 3 - zero_point_GR}
    error_IR = target_OI.T - steps_IR * scale_GR[group_of_column]
    swept_IR = steps_IR.clone()
    descent = CodeDescent(swept_IR, error_IR, moment_II, scale_GR=scale_GR, group_of_column=group_of_column, **limits)
    assert descent.sweep()
    for row in range(num_rows):
        expected_I = slow_descent(
            steps_IR[:, row],
            target_OI[row],
            moment_II,
            scale_I=scale_GR[group_of_column, row],
            lowest_I=limits["lowest_GR"][group_of_column, row],
            highest_I=limits["highest_GR"][group_of_column, row],
        )
        assert torch.equal(swept_IR[:, row], expected_I)
    torch.testing.assert_close(error_IR, target_OI.T - swept_IR * scale_GR[group_of_column])
    while descent.sweep():
        pass
    assert not descent.sweep()


@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 10, 7, 30]),
    symmetric=st.booleans(),
    code_sweeps=st.integers(0, 2),
    scale_refit=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_no_row_loses_more(
    bits: int,
    group_size: int,
    symmetric: bool,
    code_sweeps: int,
    scale_refit: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    target_OI = random_weight(6, 30, seed=seed)
    target_OI[2] = 0
    moment_II = random_moment(30, seed=seed, num_tokens=20 + seed)
    moment_II[4], moment_II[:, 4] = 0, 0
    weight = random_affine(target_OI, bits=bits, group_size=group_size, symmetric=symmetric, seed=seed)
    refined = refine(
        target_OI, moment_II, weight, SolverSettings(scale_refit=scale_refit, code_sweeps=code_sweeps, dtype=dtype)
    )
    before_O, after_O = (row_losses(target_OI, moment_II, each) for each in (weight, refined.weight))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert bool((after_O <= before_O * (1 + tolerance)).all())
    torch.testing.assert_close(refined.row_loss_O, after_O, rtol=max(tolerance, 1e-10) * 10, atol=1e-5 * tolerance)
    assert torch.equal(refined.weight.zero_point_OG, weight.zero_point_OG)
    assert torch.equal(refined.weight.codes_OI[:, 4], weight.codes_OI[:, 4])
    assert int(refined.weight.codes_OI.max()) < 2**bits
    assert torch.equal(refined.weight.scale_OG, storable_scale(refined.weight.scale_OG))
    refined.weight.with_scale_dtype(torch.float16)
    refined.weight.with_scale_dtype(torch.bfloat16)
    if not scale_refit:
        assert torch.equal(refined.weight.scale_OG, weight.scale_OG)
    if code_sweeps == 0:
        assert torch.equal(refined.weight.codes_OI, weight.codes_OI)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 10), (3, -1), (4, 10)])
def test_the_solution_of_gptq_gets_better(bits: int, group_size: int) -> None:
    case = problem(random_weight(40, 60), random_moment(60), bits=bits, group_size=group_size, search="walk")
    solution = gptq.solve(case)
    scales = refine(
        case.weight_OI, case.input_moment_II, solution.weight, SolverSettings(scale_refit=True, code_sweeps=0)
    )
    codes = refine(
        case.weight_OI, case.input_moment_II, solution.weight, SolverSettings(scale_refit=False, code_sweeps=2)
    )
    both = refine(
        case.weight_OI, case.input_moment_II, solution.weight, SolverSettings(scale_refit=True, code_sweeps=2)
    )
    before, by_scales, by_codes, by_both = (
        float(loss_O.sum()) for loss_O in (solution.row_loss_O, scales.row_loss_O, codes.row_loss_O, both.row_loss_O)
    )
    assert by_scales < before
    assert by_codes < 0.95 * before
    assert by_both < min(by_scales, by_codes)


def test_rows_are_refined_alike_whatever_stands_beside_them() -> None:
    target_OI, moment_II = random_weight(2055, 20), random_moment(20)
    weight = random_affine(target_OI, bits=2, group_size=10)
    whole = refine(target_OI, moment_II, weight, SolverSettings(scale_refit=True, code_sweeps=1, dtype=torch.float64))
    rows = slice(2046, 2051)
    part = replace(
        weight,
        codes_OI=weight.codes_OI[rows],
        scale_OG=weight.scale_OG[rows],
        zero_point_OG=weight.zero_point_OG[rows],
    )
    alone = refine(
        target_OI[rows], moment_II, part, SolverSettings(scale_refit=True, code_sweeps=1, dtype=torch.float64)
    )
    assert torch.equal(whole.weight.codes_OI[rows], alone.weight.codes_OI)
    assert torch.equal(whole.weight.scale_OG[rows], alone.weight.scale_OG)


def test_nothing_given_is_changed() -> None:
    target_OI, moment_II = random_weight(5, 30), random_moment(30)
    weight = random_affine(target_OI, bits=2, group_size=10)
    given_ = [target_OI, moment_II, weight.codes_OI, weight.scale_OG, weight.zero_point_OG]
    copies = [tensor.clone() for tensor in given_]
    refine(target_OI, moment_II, weight, SolverSettings(scale_refit=True, code_sweeps=2, dtype=torch.float64))
    refine_two_sided(
        target_OI[None],
        moment_II,
        output_moments(1, 5),
        weight,
        SolverSettings(scale_refit=True, code_sweeps=1, dtype=torch.float64),
    )
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given_, copies, strict=True))


def test_scattered_groups_are_refused() -> None:
    target_OI = random_weight(3, 20)
    weight = random_affine(target_OI, bits=2, group_size=10)
    scattered = replace(weight, group_index_I=torch.arange(20, dtype=torch.int32) % 2)
    with pytest.raises(ValueError, match="scattered"):
        refine(target_OI, random_moment(20), scattered, SolverSettings(scale_refit=True, code_sweeps=1))


@given(
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([-1, 10, 7]),
    code_sweeps=st.integers(0, 2),
    scale_refit=st.booleans(),
    rounds=st.integers(1, 2),
    seed=st.integers(0, 20),
)
@settings(max_examples=15, deadline=None)
def test_no_head_loses_more(
    bits: int, group_size: int, code_sweeps: int, scale_refit: bool, rounds: int, seed: int
) -> None:
    target_NDI, moment_II = random_weight(HEADS * HEAD_SIZE, 30, seed=seed), random_moment(30, seed=seed)
    target_NDI = target_NDI.view(HEADS, HEAD_SIZE, 30)
    moment_NDD = output_moments(HEADS, HEAD_SIZE, seed=seed)
    moment_NDD[1, 2], moment_NDD[1, :, 2] = 0, 0
    weight = random_affine(target_NDI.flatten(0, 1), bits=bits, group_size=group_size, seed=seed)
    refined = refine_two_sided(
        target_NDI,
        moment_II,
        moment_NDD,
        weight,
        SolverSettings(scale_refit=scale_refit, code_sweeps=code_sweeps, dtype=torch.float64),
        rounds=rounds,
    )
    before_N, after_N = (head_losses(target_NDI, moment_II, moment_NDD, each) for each in (weight, refined.weight))
    assert bool((after_N <= before_N).all())
    if scale_refit or code_sweeps:
        assert bool((after_N < before_N).any())
    torch.testing.assert_close(refined.row_loss_O.view(HEADS, HEAD_SIZE).sum(dim=1), after_N)


def test_rows_that_do_not_meet_are_refined_as_single_rows() -> None:
    target_OI, moment_II = random_weight(HEADS * HEAD_SIZE, 30), random_moment(30)
    weight = random_affine(target_OI, bits=2, group_size=10)
    size_ND = torch.rand(HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    alone = refine(
        target_OI, moment_II, weight, SolverSettings(scale_refit=True, code_sweeps=1, dtype=torch.float64), rounds=1
    )
    coupled = refine_two_sided(
        target_OI.view(HEADS, HEAD_SIZE, 30),
        moment_II,
        torch.diag_embed(size_ND),
        weight,
        SolverSettings(scale_refit=True, code_sweeps=1, dtype=torch.float64),
        rounds=1,
    )
    assert torch.equal(alone.weight.codes_OI, coupled.weight.codes_OI)
    assert torch.equal(alone.weight.scale_OG, coupled.weight.scale_OG)
    torch.testing.assert_close(alone.row_loss_O * size_ND.flatten(), coupled.row_loss_O)


def test_coupled_codes_descend_one_code_at_a_time() -> None:
    """Every code of the first row, then of the second, moves to what loses least in the whole head."""
    head_size, num_columns = 3, 12
    target_DI, moment_II = random_weight(head_size, num_columns), random_moment(num_columns)
    moment_II = torch.diag(torch.arange(num_columns, 0, -1, dtype=torch.float64)) + 0.3 * moment_II.clamp(-1, 1)
    moment_II = moment_II @ moment_II.T
    order_I = moment_II.diagonal().argsort(descending=True, stable=True)
    moment_DD = output_moments(1, head_size)[0]
    weight = random_affine(target_DI, bits=2, group_size=-1)
    refined = refine_two_sided(
        target_DI[None],
        moment_II,
        moment_DD[None],
        weight,
        SolverSettings(scale_refit=False, code_sweeps=1, dtype=torch.float64),
    )
    codes_DI = weight.codes_OI.clone()
    for row in range(head_size):
        for column in order_I.tolist():
            losses = []
            for code in range(4):
                codes_DI[row, column] = code
                error_DI = replace(weight, codes_OI=codes_DI).dequantize(torch.float64) - target_DI
                losses.append(float(torch.trace(moment_DD @ error_DI @ moment_II @ error_DI.T)))
            codes_DI[row, column] = losses.index(min(losses))
    assert torch.equal(refined.weight.codes_OI, codes_DI)


def closed_form_scales(
    steps_NDI: torch.Tensor, target_NDI: torch.Tensor, moment_II: torch.Tensor, moment_NDD: torch.Tensor
) -> torch.Tensor:
    """Return `s` of `(B * (V H V^T)) s = diag(B W H V^T)`, `[N, D]`, for the steps `V` of each head."""
    normal_NDD = moment_NDD * (steps_NDI @ moment_II @ steps_NDI.transpose(1, 2))
    right_ND = (moment_NDD @ target_NDI @ moment_II @ steps_NDI.transpose(1, 2)).diagonal(dim1=1, dim2=2)
    return torch.linalg.solve(normal_NDD, right_ND)


def test_coupled_scales_come_to_the_closed_form() -> None:
    target_OI, moment_II = random_weight(HEADS * HEAD_SIZE, 30), random_moment(30)
    target_NDI, moment_NDD = target_OI.view(HEADS, HEAD_SIZE, 30), output_moments(HEADS, HEAD_SIZE)
    weight = random_affine(target_OI, bits=3, group_size=-1)
    steps_NDI = (weight.codes_OI.double() - weight.zero_point_OG).view(target_NDI.shape)
    exact_ND = closed_form_scales(steps_NDI, target_NDI, moment_II, moment_NDD)

    # Scales that need not be stored: row by row, to the limit.
    scale_ND = weight.scale_OG.double().view(HEADS, HEAD_SIZE).clone()
    for _ in range(800):
        for row in range(HEAD_SIZE):
            error_NDI = target_NDI - scale_ND[:, :, None] * steps_NDI
            share_ND = moment_NDD[:, row] / moment_NDD[:, row, row, None]
            seen_NI = torch.einsum("nk,nki->ni", share_ND, error_NDI)
            equations = normal_equations(steps_NDI[:, row].T, seen_NI.T, moment_II, [slice(0, 30)])
            scale_ND[:, row] += scale_change(*equations)[:, 0]
    torch.testing.assert_close(scale_ND, exact_ND, rtol=1e-6, atol=0)

    # Stored scales come as near as their eight bits let single steps go.
    refined = refine_two_sided(
        target_NDI,
        moment_II,
        moment_NDD,
        weight,
        SolverSettings(scale_refit=True, code_sweeps=0, dtype=torch.float64),
        rounds=20,
    )
    error_NDI = exact_ND[:, :, None] * steps_NDI - target_NDI
    exact_N = (moment_NDD * (error_NDI @ moment_II @ error_NDI.transpose(1, 2))).sum(dim=(1, 2))
    before_N, after_N = (head_losses(target_NDI, moment_II, moment_NDD, each) for each in (weight, refined.weight))
    assert bool((after_N >= exact_N).all())
    assert float((after_N - exact_N).sum()) < 0.1 * float((before_N - exact_N).sum())
