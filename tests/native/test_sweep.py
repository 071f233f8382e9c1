"""Long rows in compiled code: the gradient, the scales and the sweeps against products and against torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.native_paths import native_paths
from support.problems import random_moment, random_weight
from support.slow_refine import random_affine

from optgptq.native.sweep import SweepRows, find_gradient, refit_known, sweep_codes
from optgptq.solvers.descend import CodeDescent
from optgptq.solvers.problem import SolverSettings
from optgptq.solvers.refine import refine
from optgptq.solvers.refit_scales import refit_scales

EVERY_PATH = native_paths()


def case(
    num_rows: int, num_columns: int, group_size: int, *, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, SweepRows]:
    """Return targets and rows whose gradient is not known yet; one column has no moment."""
    target_RI = random_weight(num_rows, num_columns)
    weight = random_affine(target_RI, bits=3, group_size=group_size, symmetric=False)
    zero_point_RG = weight.zero_point_OG.to(dtype)
    zero_point_RI = zero_point_RG.repeat_interleave(weight.group_size, dim=1)[:, :num_columns]
    moment_II = random_moment(num_columns, num_tokens=num_columns // 2).to(dtype)
    moment_II[num_columns // 2], moment_II[:, num_columns // 2] = 0, 0
    return target_RI.to(dtype), SweepRows(
        moment_II=moment_II,
        gradient_RI=torch.empty(num_rows, num_columns, dtype=dtype),
        steps_RI=weight.codes_OI.to(dtype) - zero_point_RI,
        scale_RG=weight.scale_OG.to(dtype),
        lowest_RG=-zero_point_RG,
        highest_RG=7 - zero_point_RG,
        group_size=weight.group_size,
    )


def error(target_RI: torch.Tensor, rows: SweepRows) -> torch.Tensor:
    scale_RI = rows.scale_RG.repeat_interleave(rows.group_size, dim=1)[:, : target_RI.shape[1]]
    return target_RI - rows.steps_RI * scale_RI


def loss(target_RI: torch.Tensor, rows: SweepRows) -> torch.Tensor:
    error_RI = error(target_RI, rows).double()
    return ((error_RI @ rows.moment_II.double()) * error_RI).sum(dim=1)


def with_gradient(path: Any, target_RI: torch.Tensor, rows: SweepRows) -> torch.Tensor:
    rows.gradient_RI.copy_(error(target_RI, rows))
    return find_gradient(path, rows)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("num_rows", [1, 19, 133])
def test_the_gradient_and_the_losses_are_those_of_products(path: Any, num_rows: int) -> None:
    target_RI, rows = case(num_rows, 77, 10)
    loss_R = with_gradient(path, target_RI, rows)
    torch.testing.assert_close(rows.gradient_RI, error(target_RI, rows) @ rows.moment_II, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss_R, loss(target_RI, rows), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "group_size"), [(1, 1, 1), (70, 90, 20), (9, 300, 128), (66, 64, 64)]
)
def test_refitted_scales_are_those_of_torch_and_the_gain_is_what_is_gained(
    path: Any, num_rows: int, num_columns: int, group_size: int
) -> None:
    target_RI, rows = case(num_rows, num_columns, group_size)
    before_R = with_gradient(path, target_RI, rows)
    groups = [slice(first, min(first + group_size, num_columns)) for first in range(0, num_columns, group_size)]
    error_IR, scale_GR = error(target_RI, rows).T.contiguous(), rows.scale_RG.T.clone()
    expected_GR = refit_scales(rows.steps_RI.T.contiguous(), error_IR, scale_GR, rows.moment_II, groups)
    changed, gain_R = refit_known(path, rows)
    assert torch.equal(rows.scale_RG, expected_GR.T)
    assert changed == (not torch.equal(expected_GR, scale_GR))
    torch.testing.assert_close(before_R - gain_R, loss(target_RI, rows), rtol=1e-8, atol=1e-10)
    assert float(gain_R.min()) >= 0


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("code_sweeps", [1, 2, 5])
@pytest.mark.parametrize(("num_rows", "num_columns", "group_size"), [(3, 257, 20), (40, 600, 128), (2, 1030, 300)])
def test_sweeps_over_many_panels_are_those_of_torch(
    path: Any, code_sweeps: int, num_rows: int, num_columns: int, group_size: int
) -> None:
    target_RI, rows = case(num_rows, num_columns, group_size)
    with_gradient(path, target_RI, rows)
    descent = CodeDescent(
        rows.steps_RI.T.contiguous(),
        error(target_RI, rows).T.contiguous(),
        rows.moment_II,
        scale_GR=rows.scale_RG.T.contiguous(),
        lowest_GR=rows.lowest_RG.T.contiguous(),
        highest_GR=rows.highest_RG.T.contiguous(),
        group_of_column=[column // group_size for column in range(num_columns)],
    )
    moved = [descent.sweep() for _ in range(code_sweeps)]
    assert sweep_codes(path, rows, code_sweeps) == any(moved)
    assert torch.equal(rows.steps_RI, descent.steps_IR.T)
    torch.testing.assert_close(rows.gradient_RI, error(target_RI, rows) @ rows.moment_II, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("path", EVERY_PATH)
def test_rows_of_many_panels_are_refined_as_in_torch(path: Any) -> None:
    target_OI = random_weight(20, 700)
    weight = random_affine(target_OI, bits=3, group_size=100)
    settings = SolverSettings(scale_refit=True, code_sweeps=2, dtype=torch.float64)
    given = (target_OI, random_moment(700, num_tokens=400), weight)
    expected = refine(*given, replace(settings, backend="torch"))
    found = refine(*given, replace(settings, backend=path))
    assert torch.equal(found.weight.codes_OI, expected.weight.codes_OI)
    assert torch.equal(found.weight.scale_OG, expected.weight.scale_OG)
    torch.testing.assert_close(found.row_loss_O, expected.row_loss_O, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", EVERY_PATH)
def test_in_float32_the_gradient_does_not_drift(path: Any) -> None:
    target_RI, rows = case(30, 600, 100, dtype=torch.float32)
    with_gradient(path, target_RI, rows)
    sweep_codes(path, rows, 20)
    exact_RI = error(target_RI, rows).double() @ rows.moment_II.double()
    size_R1 = error(target_RI, rows).double().abs() @ rows.moment_II.double().abs()
    assert float(((rows.gradient_RI - exact_RI).abs() / size_R1.clamp(min=1e-30)).max()) < 1e-5


@pytest.mark.parametrize("path", EVERY_PATH)
def test_rows_that_nothing_moves_stay_as_they_are(path: Any) -> None:
    target_RI, rows = case(5, 40, 8)
    with_gradient(path, target_RI, rows)
    while sweep_codes(path, rows, 3):
        pass
    before_RI = rows.steps_RI.clone()
    assert not sweep_codes(path, rows, 3)
    assert torch.equal(rows.steps_RI, before_RI)
