"""Rows that meet, walked in one compiled call, against torch, which defines them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.native_paths import native_paths
from support.problems import problem, random_moment, random_weight
from support.slow_two_sided import output_moments

from optgptq.native.library import load_library
from optgptq.native.panel import path_for_heads
from optgptq.solvers import LayerProblem, LayerSolution, two_sided

EVERY_PATH = native_paths()


@pytest.fixture
def threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def coupled(num_heads: int, head_size: int, num_columns: int, **keywords: Any) -> LayerProblem:
    case = problem(
        random_weight(num_heads * head_size, num_columns),
        random_moment(num_columns),
        **{"search": "walk", "column_block": 7, **keywords},
    )
    return replace(case, output_moment_NDD=output_moments(num_heads, head_size))


def solved(case: LayerProblem, backend: Any) -> LayerSolution:
    return two_sided.solve(replace(case, settings=replace(case.settings, backend=backend)))


def assert_same(found: LayerSolution, expected: LayerSolution) -> None:
    assert torch.equal(found.weight.codes_OI, expected.weight.codes_OI)
    assert torch.equal(found.weight.scale_OG, expected.weight.scale_OG)
    assert torch.equal(found.weight.zero_point_OG, expected.weight.zero_point_OG)
    assert torch.equal(found.row_clipped_O, expected.row_clipped_O)
    torch.testing.assert_close(found.row_loss_O, expected.row_loss_O, rtol=1e-9, atol=1e-12)
    assert found.coupled is not None
    assert expected.coupled is not None
    torch.testing.assert_close(found.coupled.loss_O, expected.coupled.loss_O, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("row_block", [1, 3, -1])
@pytest.mark.parametrize("row_mode", ["rows", "wavefront"])
@pytest.mark.parametrize(
    ("num_heads", "head_size", "num_columns", "group_size"),
    [(3, 5, 30, 10), (17, 7, 33, 11), (9, 4, 21, -1), (2, 6, 40, 20)],
)
def test_codes_and_grids_are_those_of_torch(
    path: Any, row_block: int, row_mode: str, num_heads: int, head_size: int, num_columns: int, group_size: int
) -> None:
    for keywords in ({"bits": 2, "symmetric": False}, {"bits": 4}, {"bits": 3, "group_grids": "static"}):
        case = coupled(
            num_heads,
            head_size,
            num_columns,
            group_size=group_size,
            row_block=row_block,
            row_mode=row_mode,
            **keywords,
        )
        assert_same(solved(case, path), solved(case, "torch"))


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_every_search_is_that_of_torch(path: Any, search: str) -> None:
    case = coupled(5, 9, 24, group_size=8, search=search, bits=3)
    assert_same(solved(case, path), solved(case, "torch"))


@pytest.mark.parametrize("path", EVERY_PATH)
def test_float32_loses_what_it_loses_in_torch(path: Any) -> None:
    case = coupled(6, 16, 120, group_size=30, bits=3, dtype=torch.float32)
    found, expected = solved(case, path).coupled, solved(case, "torch").coupled
    assert found is not None
    assert expected is not None
    assert found.loss == pytest.approx(expected.loss, rel=0.02)


@pytest.mark.usefixtures("threads_of_torch")
def test_threads_change_no_bit() -> None:
    if load_library() is None:
        pytest.skip("the compiled inner loops are not built")
    case = coupled(70, 6, 40, group_size=20, bits=3, dtype=torch.float32)
    solutions = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        solutions.append(solved(case, "auto"))
    for other in solutions[1:]:
        assert torch.equal(other.weight.codes_OI, solutions[0].weight.codes_OI)
        assert torch.equal(other.weight.scale_OG, solutions[0].weight.scale_OG)


def test_few_heads_take_shorter_vectors() -> None:
    assert path_for_heads("avx512", torch.empty(1, 1, 16)) == "avx2"
    assert path_for_heads("avx512", torch.empty(1, 1, 17)) == "avx512"
    assert path_for_heads("avx512", torch.empty(1, 1, 8, dtype=torch.float64)) == "avx2"
    assert path_for_heads("avx512", torch.empty(1, 1, 9, dtype=torch.float64)) == "avx512"
    assert path_for_heads("avx2", torch.empty(1, 1, 2)) == "avx2"
