"""Candidates of a side: what they cost is what their metric says, and rotations are rotations."""

from __future__ import annotations

import pytest
import torch

from optgptq.kv_cache.codec import SideCodec, decode, encode
from optgptq.kv_cache.rotary_pairs import RotaryPairs, untied_pair
from optgptq.kv_cache.scheme import SideScheme
from optgptq.kv_cache.transform import transform_vectors
from optgptq.kv_calibration.attend import restore_vectors
from optgptq.kv_calibration.candidates import PLAIN, SideStatistics, covariance_rotation, side_candidates, stored_metric
from optgptq.kv_calibration.ranges import chosen_ranges


def statistics(*, head_dim: int = 16, can_shift: bool = True, rotary_dim: int = 0, seed: int = 0) -> SideStatistics:
    generator = torch.Generator().manual_seed(seed)
    sizes_KD = (torch.randn(2, head_dim, generator=generator)).exp()
    x_KTD = torch.randn(2, 150, head_dim, generator=generator) * sizes_KD.unsqueeze(1) + sizes_KD.unsqueeze(1)
    factor_KDD = torch.randn(2, head_dim, head_dim, generator=generator) * torch.linspace(0.1, 2, head_dim)
    return SideStatistics(
        x_KTD=x_KTD,
        mass_KT=torch.ones(2, 150),
        metric_KDD=factor_KDD @ factor_KDD.transpose(1, 2),
        mean_KD=x_KTD.mean(1),
        partner_D=RotaryPairs(rotary_dim=rotary_dim).partners(head_dim),
        can_shift=can_shift,
    )


def cost(given: SideStatistics, x_TKD: torch.Tensor, found_TKD: torch.Tensor) -> float:
    error_TKD = (x_TKD - found_TKD).double()
    return float(torch.einsum("tkd,kde,tke->", error_TKD, given.metric_KDD.double(), error_TKD))


@pytest.mark.parametrize("head_dim", [16, 24])
def test_a_stored_error_costs_what_the_error_behind_it_costs(head_dim: int) -> None:
    given = statistics(head_dim=head_dim)
    found = side_candidates(given, SideScheme(bits=4, group_size=head_dim), "auto", rounding="fitted", max_ranges=3)
    x_TKD = torch.randn(5, 2, head_dim)
    for candidate in found:
        side = candidate.parameters
        stored_TKD = transform_vectors(x_TKD, side)
        error_TKD = torch.randn(5, 2, head_dim)
        moved_TKD = restore_vectors(stored_TKD + error_TKD, side)
        metric_KDD = stored_metric(given.metric_KDD, side)
        expected = torch.einsum("tkd,kde,tke->", error_TKD, metric_KDD, error_TKD)
        assert cost(given, x_TKD, moved_TKD) == pytest.approx(float(expected), rel=1e-3), candidate.name
        torch.testing.assert_close(restore_vectors(stored_TKD, side), x_TKD, rtol=1e-4, atol=1e-4)
        if candidate.name != PLAIN:
            assert side.metric_KDD is not None
            assert torch.equal(side.metric_KDD, metric_KDD)


def test_all_transforms_are_tried_and_the_plain_one_is_first() -> None:
    scheme = SideScheme(bits=3, group_size=8)
    given = statistics(rotary_dim=12)
    found = side_candidates(given, scheme, "auto", rounding="fitted", max_ranges=4)
    assert [candidate.name for candidate in found] == [
        PLAIN,
        "none, fitted",
        "scale, fitted",
        "hadamard, fitted",
        "covariance, fitted",
        "shift+hadamard, fitted",
        "shift_scale, fitted",
    ]
    for candidate in found:
        side = candidate.parameters
        if side.scale_KD is not None:
            assert untied_pair(side.scale_KD, RotaryPairs(rotary_dim=12)) is None
        if side.rotation_KDD is not None:
            identity = torch.matmul(side.rotation_KDD.transpose(1, 2), side.rotation_KDD)
            torch.testing.assert_close(identity, torch.eye(16).expand(2, -1, -1), rtol=0, atol=1e-5)
    plain = found[0].parameters
    assert (plain.shift_KD, plain.scale_KD, plain.rotation_KDD, plain.metric_KDD, plain.ranges_C2) == (None,) * 5


def test_fitted_codes_of_any_transform_cost_less_than_plain_ones() -> None:
    given, scheme = statistics(), SideScheme(bits=4, group_size=16)
    x_TKD = given.x_KTD.transpose(0, 1)
    costs = {}
    for candidate in side_candidates(given, scheme, "auto", rounding="fitted", max_ranges=8):
        codec = SideCodec.of(scheme, candidate.parameters, torch.device("cpu"))
        stored_TKD = decode(encode(transform_vectors(x_TKD, candidate.parameters), codec), scheme)
        costs[candidate.name] = cost(given, x_TKD, restore_vectors(stored_TKD, candidate.parameters))
    assert max(each for name, each in costs.items() if name != PLAIN) < 0.75 * costs[PLAIN]


def test_a_shift_that_changes_scores_is_not_offered() -> None:
    given = statistics(can_shift=False)
    found = side_candidates(given, SideScheme(bits=4, group_size=16), "auto", rounding="nearest", max_ranges=2)
    assert all(candidate.parameters.shift_KD is None for candidate in found)
    assert all(candidate.parameters.metric_KDD is None for candidate in found)


@pytest.mark.parametrize("transform", ["none", "shift_scale", "hadamard", "covariance"])
def test_a_named_transform_is_the_only_one_beside_plain_rounding(transform: str) -> None:
    scheme = SideScheme(bits=4, group_size=16)
    found = side_candidates(statistics(), scheme, transform, rounding="nearest", max_ranges=2)  # type: ignore[arg-type]
    assert [candidate.name for candidate in found] == [PLAIN, f"{transform}, nearest"]


def test_groups_along_tokens_are_left_without_transform_and_metric() -> None:
    scheme = SideScheme(bits=2, group_size=32, axis="token")
    found = side_candidates(statistics(), scheme, "auto", rounding="fitted", max_ranges=2)
    assert [candidate.name for candidate in found] == [PLAIN, "none, nearest"]
    assert found[1].parameters.metric_KDD is None
    assert found[1].parameters.ranges_C2 is not None
    assert found[1].parameters.ranges_C2[0].tolist() == [1.0, 1.0]


def test_the_covariance_rotation_spreads_the_metric_evenly() -> None:
    metric_KDD = statistics().metric_KDD
    diagonal_KD = stored_diagonal(metric_KDD, covariance_rotation(metric_KDD))
    torch.testing.assert_close(diagonal_KD, diagonal_KD.mean(1, keepdim=True).expand_as(diagonal_KD), rtol=1e-3, atol=0)


def stored_diagonal(metric_KDD: torch.Tensor, rotation_KDD: torch.Tensor) -> torch.Tensor:
    return (rotation_KDD.transpose(1, 2) @ metric_KDD @ rotation_KDD).diagonal(dim1=1, dim2=2)


def test_each_further_range_lowers_the_loss() -> None:
    given, scheme = statistics(), SideScheme(bits=2, group_size=8)
    stored_TKD = given.x_KTD.transpose(0, 1)
    many_C2 = chosen_ranges(stored_TKD, given.metric_KDD, scheme, max_ranges=6)
    assert many_C2[0].tolist() == [1.0, 1.0]
    assert len({tuple(row) for row in many_C2.tolist()}) == len(many_C2) == 6
    weight_KD = given.metric_KDD.diagonal(dim1=1, dim2=2)
    losses = []
    for count in range(1, 7):
        codec = SideCodec(scheme=scheme, ranges_C2=many_C2[:count])
        error_TKD = stored_TKD - decode(encode(stored_TKD, codec), scheme)
        losses.append(float((error_TKD.square() * weight_KD).sum((0, 2)).sum()))
    # The codec without a metric chooses by the unweighted error, so only the whole list must pay.
    assert losses[-1] < losses[0]
    assert torch.equal(chosen_ranges(stored_TKD, given.metric_KDD, scheme, max_ranges=3), many_C2[:3])
    assert len(chosen_ranges(stored_TKD, given.metric_KDD, SideScheme(bits=8, group_size=8), max_ranges=6)) == 1
