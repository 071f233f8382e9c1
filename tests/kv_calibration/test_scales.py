"""Scales that make rounding cheap: against a literal version, and what must hold for any numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.kv_cache.rotary_pairs import RotaryPairs, untied_pair
from optgptq.kv_calibration.scales import ALPHAS, RangeProblem, alpha_scale, fixed_point_scale, range_objective


def problem(
    seed: int, *, num_heads: int = 2, num_vectors: int = 37, head_dim: int = 12, groups: int = 1, rotary_dim: int = 0
) -> RangeProblem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x_KTD = normal(num_heads, num_vectors, head_dim) * (1.5 * normal(num_heads, 1, head_dim)).exp()
    return RangeProblem(
        x_KTD=x_KTD,
        weight_KD=normal(num_heads, head_dim).square(),
        mass_KT=normal(num_heads, num_vectors).square(),
        group_size=head_dim // groups,
        partner_D=RotaryPairs(rotary_dim=rotary_dim).partners(head_dim),
    )


def literal_objective(given: RangeProblem, scale_KD: torch.Tensor, head: int) -> float:
    head_dim, size = scale_KD.shape[1], given.group_size
    total = 0.0
    for first in range(0, head_dim, size):
        channels = range(first, first + size)
        noise = sum(float(given.weight_KD[head, c]) * float(scale_KD[head, c]) ** 2 for c in channels)
        spread = 0.0
        for t in range(given.x_KTD.shape[1]):
            scaled = [float(given.x_KTD[head, t, c]) / float(scale_KD[head, c]) for c in channels]
            spread += float(given.mass_KT[head, t]) * (max(scaled) - min(scaled)) ** 2
        total += noise * spread / given.x_KTD.shape[1]
    return total


@pytest.mark.parametrize("groups", [1, 3])
def test_the_objective_is_the_formula(groups: int) -> None:
    given = problem(1, groups=groups)
    scale_KD = alpha_scale(given, 0.3)
    expected = torch.tensor([literal_objective(given, scale_KD, head) for head in range(2)], dtype=torch.float64)
    torch.testing.assert_close(range_objective(given, scale_KD), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rotary_dim", [0, 8, 12])
def test_the_fixed_point_is_a_minimum(rotary_dim: int) -> None:
    """No change of a pair's scale by a percent lowers the objective by more than what 60 steps leave."""
    given = problem(2, num_vectors=301, rotary_dim=rotary_dim)
    scale_KD = fixed_point_scale(given)
    found_K = range_objective(given, scale_KD)
    assert untied_pair(scale_KD, RotaryPairs(rotary_dim=rotary_dim)) is None
    for channel in range(12):
        for factor in (0.97, 1.03):
            moved_KD = scale_KD.clone()
            moved_KD[:, [channel, int(given.partner_D[channel])]] *= factor
            assert (range_objective(given, moved_KD) > found_K * 0.995).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.sampled_from([1, 2]),
    rotary_dim=st.sampled_from([0, 4, 12]),
    unit=st.floats(-6, 6),
)
def test_the_fixed_point_is_never_worse_than_simpler_scales(
    seed: int, groups: int, rotary_dim: int, unit: float
) -> None:
    given = problem(seed, groups=groups, rotary_dim=rotary_dim)
    found_K = range_objective(given, fixed_point_scale(given))
    simple = [torch.ones_like(given.weight_KD), *(alpha_scale(given, alpha) for alpha in ALPHAS)]
    for scale_KD in simple:
        assert (found_K <= range_objective(given, scale_KD) * (1 + 1e-12)).all()
    # Neither units of the vectors, nor of weights and masses, change what is found.
    other = replace(
        given, x_KTD=given.x_KTD * 10.0**unit, weight_KD=given.weight_KD * 7, mass_KT=given.mass_KT * 10.0**-unit
    )
    torch.testing.assert_close(fixed_point_scale(other), fixed_point_scale(given), rtol=1e-6, atol=0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_channels_have_no_order(seed: int) -> None:
    given = problem(seed)
    order_D = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    other = replace(given, x_KTD=given.x_KTD[:, :, order_D], weight_KD=given.weight_KD[:, order_D])
    torch.testing.assert_close(fixed_point_scale(other), fixed_point_scale(given)[:, order_D], rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_numbers_give_finite_scales(dtype: torch.dtype) -> None:
    given = problem(3, num_heads=4)
    x_KTD, weight_KD = given.x_KTD.clone(), given.weight_KD.clone()
    x_KTD[0, :, 5] = 0
    x_KTD[1] = 0
    weight_KD[2] = 0
    x_KTD[3, :, 2] = 1e6
    extreme = replace(given, x_KTD=x_KTD.to(dtype), weight_KD=weight_KD.to(dtype), mass_KT=given.mass_KT.to(dtype))
    scale_KD = fixed_point_scale(extreme)
    assert torch.isfinite(scale_KD).all()
    assert (scale_KD > 0).all()


def test_the_largest_of_a_pair_counts_for_both() -> None:
    given = problem(4, rotary_dim=8)
    scale_KD = alpha_scale(given, 1.0)
    largest_KD = given.x_KTD.abs().amax(1)
    expected_K = torch.maximum(largest_KD[:, 1], largest_KD[:, 5]) / largest_KD[:, 9]
    torch.testing.assert_close(scale_KD[:, 1] / scale_KD[:, 9], expected_K)
    assert torch.equal(scale_KD[:, 1], scale_KD[:, 5])
