"""Coupling and rank of row factors, and the layers whose row factors describe pairs that are never seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.attention_layers import attention_layer

from optgptq.calibration.row_factors import row_factor_quality, two_sided_reason, value_output_moments
from optgptq.models.spec import NormSpec


def test_coupling_and_rank_of_every_head() -> None:
    generator = torch.Generator().manual_seed(0)
    root_DT = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    coupled_DD = torch.eye(6, dtype=torch.float64)
    coupled_DD[0, 1] = coupled_DD[1, 0] = 0.5
    diagonal_DD = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    moments_NDD = torch.stack([root_DT @ root_DT.T, coupled_DD, diagonal_DD, torch.zeros(6, 6, dtype=torch.float64)])
    low_rank, coupled, diagonal, dead = row_factor_quality(moments_NDD)
    assert (low_rank.rank, coupled.rank, diagonal.rank, dead.rank) == (2, 6, 6, 0)
    assert coupled.coupling == pytest.approx((0.5 / 6**0.5) * 2**0.5)
    assert diagonal.coupling == dead.coupling == 0
    assert low_rank.one_sided_reason() == "its row factor has rank 2 of 6"
    assert coupled.one_sided_reason() is None
    assert coupled.one_sided_reason(smallest_coupling=0.5) == "its row factor is nearly diagonal (coupling 0.29)"
    assert diagonal.one_sided_reason() == "its row factor is nearly diagonal (coupling 0)"
    assert dead.one_sided_reason() == "what the head is multiplied with is zero everywhere"


def test_rounding_noise_of_a_float32_sum_is_no_rank() -> None:
    root_DT = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    (quality,) = row_factor_quality((root_DT @ root_DT.T).unsqueeze(0))
    assert quality.rank == 4
    assert quality.size == 32


@pytest.mark.parametrize(("window", "num_positions", "used"), [(None, 99, True), (5, 10, True), (5, 11, False)])
def test_windows_shorter_than_half_are_excluded(window: int | None, num_positions: int, used: bool) -> None:
    reason = two_sided_reason(attention_layer(window=window).spec, 0, num_positions)
    assert (reason is None) == used
    if reason is not None:
        assert reason == "decoder layer 0 sees 5 keys, fewer than half of the 11 positions of a calibration window"


def test_norms_that_subtract_a_mean_are_excluded() -> None:
    spec = replace(attention_layer(norms=True).spec, norm=NormSpec(kind="layer", eps=1e-5))
    assert two_sided_reason(spec, 0, 8) == "the query and key norms of decoder layer 0 subtract a mean"
    assert two_sided_reason(attention_layer(norms=True).spec, 0, 8) is None


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_value_factor_is_the_mean_over_the_heads_that_share_it(num_kv_heads: int) -> None:
    spec = attention_layer(num_kv_heads=num_kv_heads).spec
    output_OI = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    found_KDD = value_output_moments(output_OI, spec)
    assert found_KDD.dtype == torch.float64
    group = 6 // num_kv_heads
    for kv_head in range(num_kv_heads):
        expected_DD = torch.zeros(5, 5, dtype=torch.float64)
        for head in range(kv_head * group, (kv_head + 1) * group):
            columns_OD = output_OI[:, head * 5 : (head + 1) * 5].double()
            expected_DD += columns_OD.T @ columns_OD / group
        torch.testing.assert_close(found_KDD[kv_head], expected_DD, rtol=1e-12, atol=1e-12)
