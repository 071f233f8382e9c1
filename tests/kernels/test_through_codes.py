"""Vectors through codes and back are what the definition makes of them."""

from __future__ import annotations

import pytest
import torch
from support.kv_cache import random_metric

from optgptq.kernels.through_codes import through_codes
from optgptq.kv_cache.codec import SideCodec, decode, encode
from optgptq.kv_cache.scheme import SideScheme
from optgptq.kv_cache.setup import SideParameters

CPU = torch.device("cpu")


def vectors(num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, 3, 24, generator=generator) + torch.randn(24, generator=generator)


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 33, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [24, 8])
def test_nearest_codes_are_those_of_the_definition(num_tokens: int, bits: int, group_size: int) -> None:
    x_TKD, scheme = vectors(num_tokens), SideScheme(bits=bits, group_size=group_size)
    codec = SideCodec.of(scheme, SideParameters(), CPU)
    torch.testing.assert_close(through_codes(x_TKD, codec), decode(encode(x_TKD, codec), scheme))


@pytest.mark.parametrize("num_tokens", [9, 32])
def test_groups_along_tokens(num_tokens: int) -> None:
    scheme = SideScheme(bits=4, group_size=num_tokens, axis="token")
    x_TKD, codec = vectors(num_tokens), SideCodec.of(scheme, SideParameters(), CPU)
    torch.testing.assert_close(through_codes(x_TKD, codec), decode(encode(x_TKD, codec), scheme), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 4])
def test_fitted_codes_are_as_good(bits: int) -> None:
    x_TKD, scheme = vectors(301), SideScheme(bits=bits, group_size=24)
    metric_KDD = random_metric(3, 24, torch.Generator().manual_seed(1))
    codec = SideCodec.of(scheme, SideParameters(metric_KDD=metric_KDD), CPU)

    def loss(found_TKD: torch.Tensor) -> float:
        error_TKD = (x_TKD - found_TKD).double()
        return float(torch.einsum("tkd,kde,tke->", error_TKD, metric_KDD.double(), error_TKD))

    found_TKD, expected_TKD = through_codes(x_TKD, codec), decode(encode(x_TKD, codec), scheme)
    assert loss(found_TKD) <= 1.001 * loss(expected_TKD)
    assert float((found_TKD != expected_TKD).float().mean()) < 0.05
