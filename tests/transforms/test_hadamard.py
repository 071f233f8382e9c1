from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.errors import OptGPTQError
from optgptq.transforms.hadamard import (
    hadamard,
    hadamard_factors,
    orthogonal_fixing_ones,
    random_orthogonal,
    random_signs,
)


def is_orthogonal(matrix: torch.Tensor) -> bool:
    size = matrix.shape[0]
    return matrix.shape == (size, size) and torch.allclose(
        matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("base", [1, 12, 20, 28, 36, 40, 52, 60, 108, 140])
@pytest.mark.parametrize("power", [0, 1, 3])
def test_sizes_that_models_have(base: int, power: int) -> None:
    size = base << power
    matrix = hadamard(size)
    assert matrix.dtype == torch.float64
    assert is_orthogonal(matrix)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("size", "base"), [(5120, 20), (6656, 52), (3584, 28), (3072, 12), (896, 28), (312, 312)])
def test_large_sizes_are_products_of_small_factors(size: int, base: int) -> None:
    factors = hadamard_factors(size)
    assert factors is not None
    assert factors[0].shape[0] == base
    assert all(factor.shape[0] <= max(base, 64) for factor in factors)
    assert torch.tensor([factor.shape[0] for factor in factors]).prod() == size


@pytest.mark.parametrize("size", [3, 6, 10, 24 + 1, 92, 156, 172, 344])
def test_sizes_without_a_construction_are_refused(size: int) -> None:
    assert hadamard_factors(size) is None
    with pytest.raises(OptGPTQError) as caught:
        hadamard(size)
    assert caught.value.found == str(size)
    assert "random orthogonal" in caught.value.action


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 60), seed=st.integers(0, 2**63))
def test_random_matrices_are_orthogonal_and_repeat(size: int, seed: int) -> None:
    matrix, fixing = random_orthogonal(size, seed), orthogonal_fixing_ones(size, seed)
    ones = torch.ones(size, dtype=torch.float64)
    assert is_orthogonal(matrix)
    assert is_orthogonal(fixing)
    assert torch.allclose(fixing @ ones, ones, rtol=0, atol=1e-12)
    assert torch.allclose(fixing.T @ ones, ones, rtol=0, atol=1e-12)
    assert torch.equal(matrix, random_orthogonal(size, seed))
    assert torch.equal(random_signs(size, seed).abs(), ones)


def test_seeds_and_paths_give_other_matrices_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    # The last seed equals the first in its low 32 bits, all that torch's own generator would look at.
    paths = [(7,), (8,), (7, 0, 0), (7, 0, 1), (7, 1, 0), (7 + 2**32,)]
    matrices = [random_orthogonal(5, *path) for path in paths]
    signs = [random_signs(64, *path) for path in paths]
    for index in range(len(paths)):
        assert not any(torch.equal(matrices[index], other) for other in matrices[:index])
        assert not any(torch.equal(signs[index], other) for other in signs[:index])
    assert torch.equal(torch.get_rng_state(), state)
