"""The scale refit against its formula, its gradient and the limit of coordinate descent."""

from __future__ import annotations

import pytest
import torch
from support.problems import random_moment, random_weight
from support.slow_refine import group_masked, random_affine

from optgptq.grids.affine import storable_scale
from optgptq.solvers.refit_scales import normal_equations, refit_scales, scale_change

ROWS, COLUMNS = 7, 30


def case(group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[slice]]:
    """Return steps, target and scales by columns, the moment, and the groups; the last group may be shorter."""
    target_OI, moment_II = random_weight(ROWS, COLUMNS), random_moment(COLUMNS)
    weight = random_affine(target_OI, bits=3, group_size=group_size, symmetric=False)
    groups = [slice(begin, min(begin + group_size, COLUMNS)) for begin in range(0, COLUMNS, group_size)]
    index_I = torch.arange(COLUMNS) // group_size
    steps_IR = (weight.codes_OI.double() - weight.zero_point_OG[:, index_I]).T.contiguous()
    return steps_IR, target_OI.T.contiguous(), weight.scale_OG.T.double().contiguous(), moment_II, groups


def error(steps_IR: torch.Tensor, target_IR: torch.Tensor, scale_GR: torch.Tensor, groups: list[slice]) -> torch.Tensor:
    lengths = torch.tensor([columns.stop - columns.start for columns in groups])
    return target_IR - steps_IR * scale_GR.repeat_interleave(lengths, dim=0)


def losses(error_IR: torch.Tensor, moment_II: torch.Tensor) -> torch.Tensor:
    return ((moment_II @ error_IR) * error_IR).sum(dim=0)


@pytest.mark.parametrize("group_size", [30, 10, 7, 1])
def test_normal_equations_are_those_of_the_group_masked_codes(group_size: int) -> None:
    steps_IR, target_IR, scale_GR, moment_II, groups = case(group_size)
    error_IR = error(steps_IR, target_IR, scale_GR, groups)
    normal_RGG, slope_RG = normal_equations(steps_IR, error_IR, moment_II, groups)
    for row in range(ROWS):
        masked_GI = group_masked(steps_IR[:, row], groups)
        torch.testing.assert_close(normal_RGG[row], masked_GI @ moment_II @ masked_GI.T)
        torch.testing.assert_close(slope_RG[row], masked_GI @ moment_II @ error_IR[:, row])


@pytest.mark.parametrize("group_size", [30, 10, 7])
def test_exact_scales_have_no_gradient_and_are_the_limit_of_coordinate_descent(group_size: int) -> None:
    steps_IR, target_IR, scale_GR, moment_II, groups = case(group_size)
    exact_GR = scale_GR.clone()
    # The ridge pulls to the scales of before, so that a second step takes away what it left.
    for _ in range(3):
        equations = normal_equations(steps_IR, error(steps_IR, target_IR, exact_GR, groups), moment_II, groups)
        exact_GR = exact_GR + scale_change(*equations).T
    _, first_RG = normal_equations(steps_IR, error(steps_IR, target_IR, scale_GR, groups), moment_II, groups)
    normal_RGG, slope_RG = normal_equations(steps_IR, error(steps_IR, target_IR, exact_GR, groups), moment_II, groups)
    assert float(slope_RG.abs().max()) < 1e-9 * float(first_RG.abs().max())

    descended_GR = scale_GR.clone()
    for _ in range(2000):
        for group in range(len(groups)):
            change_RG = (exact_GR - descended_GR).T
            along_R = (normal_RGG[:, group] * change_RG).sum(dim=1)
            descended_GR[group] += along_R / normal_RGG[:, group, group].clamp(min=1e-12)
    error_IR = error(steps_IR, target_IR, descended_GR, groups)
    torch.testing.assert_close(descended_GR, exact_GR, rtol=1e-6, atol=1e-9)
    _, descended_RG = normal_equations(steps_IR, error_IR, moment_II, groups)
    assert float(descended_RG.abs().max()) < 1e-6 * float(first_RG.abs().max())


@pytest.mark.parametrize("group_size", [30, 10, 7, 1])
def test_refitted_scales_can_be_stored_and_lose_less(group_size: int) -> None:
    steps_IR, target_IR, scale_GR, moment_II, groups = case(group_size)
    before_IR = error(steps_IR, target_IR, scale_GR, groups)
    refitted_GR = refit_scales(steps_IR, before_IR, scale_GR, moment_II, groups)
    assert torch.equal(refitted_GR, storable_scale(refitted_GR))
    ratio_GR = refitted_GR / scale_GR
    assert 0.5 <= float(ratio_GR.min()) <= float(ratio_GR.max()) <= 2
    after_R = losses(error(steps_IR, target_IR, refitted_GR, groups), moment_II)
    before_R = losses(before_IR, moment_II)
    assert bool((after_R <= before_R * (1 + 1e-12)).all())
    assert float(after_R.sum()) < 0.99 * float(before_R.sum())


def test_groups_whose_codes_are_all_the_zero_point_keep_their_scale() -> None:
    steps_IR, target_IR, scale_GR, moment_II, groups = case(10)
    steps_IR[groups[1]] = 0
    steps_IR[:, 3] = 0
    refitted_GR = refit_scales(steps_IR, error(steps_IR, target_IR, scale_GR, groups), scale_GR, moment_II, groups)
    assert bool(torch.isfinite(refitted_GR).all())
    assert torch.equal(refitted_GR[1], scale_GR[1])
    assert torch.equal(refitted_GR[:, 3], scale_GR[:, 3])
    assert not torch.equal(refitted_GR[0], scale_GR[0])


def test_a_scale_that_would_change_its_sign_stays() -> None:
    steps_IR, target_IR, scale_GR, moment_II, groups = case(30)
    refitted_GR = refit_scales(steps_IR, error(steps_IR, -target_IR, scale_GR, groups), scale_GR, moment_II, groups)
    best_R = (torch.linalg.solve(*_normal(steps_IR, -target_IR, moment_II, groups))).squeeze()
    assert bool((best_R * scale_GR[0] < 0).any())
    assert bool((refitted_GR * scale_GR > 0).all())


def _normal(
    steps_IR: torch.Tensor, target_IR: torch.Tensor, moment_II: torch.Tensor, groups: list[slice]
) -> tuple[torch.Tensor, torch.Tensor]:
    normal_RGG, slope_RG = normal_equations(steps_IR, target_IR, moment_II, groups)
    return normal_RGG, slope_RG[:, :, None]
