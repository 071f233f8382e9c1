"""Orders, damping and the reverse Cholesky factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.problems import random_moment
from support.slow_gptq import pivots, slow_min_pivot, slow_order

from optgptq.errors import NumericalError
from optgptq.solvers.factor import DAMPING_LADDER, Factor, column_order, factor_moment, reverse_cholesky

ORDERS = ("natural", "activation", "group_aware", "min_pivot")


def factored(moment_II: torch.Tensor, **changes: Any) -> Factor:
    settings: dict[str, Any] = {
        "name": "linear",
        "order": "natural",
        "group_size": moment_II.shape[0],
        "damp_ratio": 0.01,
        "dtype": torch.float64,
    }
    return factor_moment(moment_II, **{**settings, **changes})


@pytest.mark.parametrize("num_columns", [1, 2, 63, 130])
def test_factor_is_the_inverse_of_the_classic_one(num_columns: int) -> None:
    moment_II = random_moment(num_columns)
    upper_II = reverse_cholesky(moment_II, damp=0.1)
    assert upper_II is not None
    damped_II = moment_II + 0.1 * torch.eye(num_columns, dtype=torch.float64)
    classic_II = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True)
    assert torch.equal(upper_II, upper_II.triu())
    torch.testing.assert_close(upper_II @ upper_II.T, damped_II, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(classic_II @ upper_II, torch.eye(num_columns, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("num_columns", "group_size"), [(48, 16), (130, 13), (63, 63)])
def test_orders_equal_the_slow_ones(order: str, num_columns: int, group_size: int) -> None:
    moment_II = random_moment(num_columns, seed=num_columns)
    factor = factored(moment_II, order=order, group_size=group_size)
    assert factor.order_I.tolist() == slow_order(moment_II, order, group_size=group_size)
    damped_II = moment_II + 0.01 * float(moment_II.diagonal().mean()) * torch.eye(num_columns, dtype=torch.float64)
    permuted_II = damped_II[factor.order_I][:, factor.order_I]
    torch.testing.assert_close(factor.upper_II @ factor.upper_II.T, permuted_II, rtol=1e-10, atol=1e-12)


def test_ties_keep_the_natural_order() -> None:
    moment_II = torch.eye(12, dtype=torch.float64)
    for order in ("activation", "group_aware"):
        assert column_order(moment_II, order, 4, damp=0.0).tolist() == list(range(12))


def test_group_aware_keeps_groups_contiguous_and_sorts_inside_them() -> None:
    moment_II = random_moment(96, seed=5)
    order_I = column_order(moment_II, "group_aware", 16, damp=0.0)
    groups_GL = (order_I // 16).reshape(6, 16)
    assert bool((groups_GL == groups_GL[:, :1]).all())
    diagonal_GL = moment_II.diagonal()[order_I].reshape(6, 16)
    assert bool((diagonal_GL.diff(dim=1) <= 0).all())
    assert bool((diagonal_GL[:, 0].diff() <= 0).all())


@pytest.mark.parametrize("seed", range(5))
def test_min_pivot_lowers_the_trace_of_pivots(seed: int) -> None:
    moment_II = random_moment(40, seed=seed)
    natural = float(pivots(moment_II, list(range(40))).sum())
    order = column_order(moment_II, "min_pivot", 40, damp=0.0).tolist()
    assert order == slow_min_pivot(moment_II)
    assert float(pivots(moment_II, order).sum()) <= natural


def test_min_pivot_ends_on_a_singular_moment() -> None:
    moment_II = random_moment(20, num_tokens=3)
    order = column_order(moment_II, "min_pivot", 20, damp=0.0).tolist()
    assert sorted(order) == list(range(20))


@pytest.mark.parametrize("order", ORDERS)
def test_moments_of_too_few_tokens_are_factored_with_the_asked_damping(order: str) -> None:
    moment_II = random_moment(48, num_tokens=3)
    before_II = moment_II.clone()
    factor = factored(moment_II, order=order)
    assert factor.damp_ratio_used == 0.01
    assert bool(torch.isfinite(factor.upper_II).all())
    assert torch.equal(moment_II, before_II)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_all_zero_moment_is_the_identity(dtype: torch.dtype) -> None:
    factor = factored(torch.zeros(8, 8, dtype=dtype), dtype=dtype)
    assert bool(factor.dead_I.all())
    torch.testing.assert_close(factor.upper_II, 1.01**0.5 * torch.eye(8, dtype=dtype))


def test_damping_is_raised_until_the_factorization_succeeds() -> None:
    moment_II = _indefinite(smallest=-0.2)
    before_II = moment_II.clone()
    factor = factored(moment_II)
    assert factor.damp_ratio_used == 0.3
    assert torch.equal(moment_II, before_II)
    mean = float(moment_II.diagonal().mean())
    torch.testing.assert_close(
        factor.upper_II @ factor.upper_II.T, moment_II + 0.3 * mean * torch.eye(10, dtype=torch.float64)
    )
    assert factored(moment_II, damp_ratio=0.15).damp_ratio_used == 0.3
    assert factored(moment_II, damp_ratio=0.5).damp_ratio_used == 0.5


def test_a_moment_that_no_damping_helps_is_refused_with_what_was_tried() -> None:
    moment_II = _indefinite(smallest=-3.0)
    with pytest.raises(NumericalError) as caught:
        factored(moment_II, damp_ratio=0.02)
    tried = (0.02, *(ratio for ratio in DAMPING_LADDER if ratio > 0.02))
    assert caught.value.where == "linear: input moment"
    assert str(tried) in caught.value.found
    assert "moment_dtype=float64" in caught.value.action


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("order", ORDERS)
def test_moments_that_are_not_finite_are_refused(value: float, order: str) -> None:
    moment_II = random_moment(6)
    moment_II[2, 4] = value
    before_II = moment_II.clone()
    with pytest.raises(NumericalError) as caught:
        factored(moment_II, order=order)
    assert caught.value.found == "NaN or infinity"
    assert torch.equal(moment_II.nan_to_num(nan=7.0), before_II.nan_to_num(nan=7.0))


def test_moments_near_the_end_of_float32_end_in_an_error_and_not_in_infinities() -> None:
    with pytest.raises(NumericalError):
        factored(torch.full((4, 4), 3e38), dtype=torch.float32, damp_ratio=0.5)


def _indefinite(*, smallest: float) -> torch.Tensor:
    """Return a symmetric matrix with mean diagonal 1 and one negative eigenvalue."""
    generator = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64))
    values = torch.full((10,), (10 - smallest) / 9, dtype=torch.float64)
    values[0] = smallest
    matrix_II = basis @ torch.diag(values) @ basis.T
    symmetric_II: torch.Tensor = (matrix_II + matrix_II.T) / 2
    return symmetric_II
