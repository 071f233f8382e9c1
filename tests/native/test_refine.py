"""Refinement in compiled code against torch, which defines it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native_paths import native_paths
from support.problems import random_moment, random_weight
from support.slow_refine import random_affine
from support.slow_two_sided import output_moments

from optgptq.affine_weight import AffineWeight
from optgptq.native.library import load_library
from optgptq.solvers.problem import SolverSettings
from optgptq.solvers.refine import Refined, refine, refine_two_sided

EVERY_PATH = native_paths()
FLOAT64 = SolverSettings(scale_refit=True, code_sweeps=2, dtype=torch.float64)


@pytest.fixture
def threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def case(
    num_rows: int, num_columns: int, *, seed: int = 0, **affine: Any
) -> tuple[torch.Tensor, torch.Tensor, AffineWeight]:
    """Return a target with a row of zeros, a moment with a dead column, and a poor quantization."""
    target_OI = random_weight(num_rows, num_columns, seed=seed)
    target_OI[num_rows // 3] = 0
    moment_II = random_moment(num_columns, seed=seed, num_tokens=num_columns // 2 + 3)
    dead = num_columns // 2
    moment_II[dead], moment_II[:, dead] = 0, 0
    return target_OI, moment_II, random_affine(target_OI, seed=seed, **affine)


def assert_same(found: Refined, expected: Refined) -> None:
    assert torch.equal(found.weight.codes_OI, expected.weight.codes_OI)
    assert torch.equal(found.weight.scale_OG, expected.weight.scale_OG)
    torch.testing.assert_close(found.row_loss_O, expected.row_loss_O, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "group_size", "bits"),
    [
        (1, 1, -1, 2),
        (5, 30, -1, 2),
        (70, 30, 10, 3),
        (33, 85, 20, 4),
        (131, 150, 30, 2),
        (9, 133, 1, 4),
        (17, 64, 8, 8),
    ],
)
def test_every_path_gives_the_codes_and_scales_of_torch(
    path: Any, num_rows: int, num_columns: int, group_size: int, bits: int
) -> None:
    target_OI, moment_II, weight = case(num_rows, num_columns, bits=bits, group_size=group_size, symmetric=False)
    for scale_refit, code_sweeps in [(True, 2), (False, 1), (True, 0), (False, 0)]:
        asked = replace(FLOAT64, scale_refit=scale_refit, code_sweeps=code_sweeps)
        expected = refine(target_OI, moment_II, weight, replace(asked, backend="torch"))
        assert_same(refine(target_OI, moment_II, weight, replace(asked, backend=path)), expected)


@pytest.mark.parametrize("path", EVERY_PATH)
@settings(deadline=None, max_examples=25)
@given(
    num_rows=st.integers(1, 40),
    num_columns=st.integers(1, 40),
    group_size=st.sampled_from([-1, 4, 7, 16]),
    bits=st.sampled_from([1, 2, 3, 4]),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
    rounds=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_rows_of_any_size_are_those_of_torch(
    path: Any, num_rows: int, num_columns: int, group_size: int, bits: int, size: float, rounds: int, seed: int
) -> None:
    target_OI = size * random_weight(num_rows, num_columns, seed=seed)
    moment_II = random_moment(num_columns, seed=seed)
    weight = random_affine(target_OI, bits=bits, group_size=group_size, seed=seed)
    expected = refine(target_OI, moment_II, weight, replace(FLOAT64, backend="torch"), rounds=rounds)
    assert_same(refine(target_OI, moment_II, weight, replace(FLOAT64, backend=path), rounds=rounds), expected)


@pytest.mark.parametrize("path", EVERY_PATH)
def test_rows_that_meet_are_those_of_torch(path: Any) -> None:
    target_OI, moment_II, weight = case(21, 50, bits=2, group_size=20, symmetric=False)
    given_ = (target_OI.view(3, 7, 50), moment_II, output_moments(3, 7), weight)
    expected = refine_two_sided(*given_, replace(FLOAT64, backend="torch"), rounds=2)
    assert_same(refine_two_sided(*given_, replace(FLOAT64, backend=path), rounds=2), expected)


@pytest.mark.parametrize("path", EVERY_PATH)
def test_float32_loses_what_it_loses_in_torch(path: Any) -> None:
    target_OI, moment_II, weight = case(90, 200, bits=3, group_size=50, symmetric=True)
    asked = SolverSettings(scale_refit=True, code_sweeps=2)
    expected = refine(target_OI, moment_II, weight, replace(asked, backend="torch"))
    found = refine(target_OI, moment_II, weight, replace(asked, backend=path))
    assert float(found.row_loss_O.sum()) == pytest.approx(float(expected.row_loss_O.sum()), rel=1e-3)


@pytest.mark.parametrize("path", EVERY_PATH)
def test_a_singular_group_keeps_its_scale(path: Any) -> None:
    """Two groups with the same inputs and steps: no scale of theirs is the best one."""
    moment_II = random_moment(8).repeat(2, 2)
    target_OI = random_weight(3, 16)
    weight = random_affine(target_OI, bits=2, group_size=8)
    codes_OI = weight.codes_OI.clone()
    codes_OI[:, 8:], codes_OI[2] = codes_OI[:, :8], 2
    weight = replace(weight, codes_OI=codes_OI)
    asked = replace(FLOAT64, code_sweeps=0)
    found = refine(target_OI, moment_II, weight, replace(asked, backend=path))
    assert_same(found, refine(target_OI, moment_II, weight, replace(asked, backend="torch")))
    # All its codes are the zero point.
    assert torch.equal(found.weight.scale_OG[2], weight.scale_OG[2])


@pytest.mark.usefixtures("threads_of_torch")
def test_neither_threads_nor_the_rows_beside_a_row_change_a_bit() -> None:
    if load_library() is None:
        pytest.skip("the compiled inner loops are not built")
    target_OI, moment_II, weight = case(301, 130, bits=2, group_size=65)
    asked = SolverSettings(scale_refit=True, code_sweeps=2)
    torch.set_num_threads(1)
    alone = refine(target_OI, moment_II, weight, asked)
    rows = slice(100, 105)
    part = replace(
        weight,
        codes_OI=weight.codes_OI[rows],
        scale_OG=weight.scale_OG[rows],
        zero_point_OG=weight.zero_point_OG[rows],
    )
    few = refine(target_OI[rows], moment_II, part, asked)
    assert torch.equal(few.weight.codes_OI, alone.weight.codes_OI[rows])
    assert torch.equal(few.weight.scale_OG, alone.weight.scale_OG[rows])
    for num_threads in (2, 3):
        torch.set_num_threads(num_threads)
        shared = refine(target_OI, moment_II, weight, asked)
        assert torch.equal(shared.weight.codes_OI, alone.weight.codes_OI)
        assert torch.equal(shared.weight.scale_OG, alone.weight.scale_OG)
