"""Rotary pairs: which channels belong together, and why their scales must be the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.kv_cache.rotary_pairs import RotaryPairs, untied_pair


def turned(key_D: torch.Tensor, pairs: RotaryPairs, angles: list[float]) -> torch.Tensor:
    """Turn pair after pair, written out."""
    result_D = key_D.clone()
    for number, angle in enumerate(angles):
        first = 2 * number if pairs.interleaved else number
        second = first + 1 if pairs.interleaved else number + pairs.rotary_dim // 2
        cosine, sine = torch.tensor(angle).cos(), torch.tensor(angle).sin()
        result_D[first] = key_D[first] * cosine - key_D[second] * sine
        result_D[second] = key_D[second] * cosine + key_D[first] * sine
    return result_D


def test_partners() -> None:
    assert RotaryPairs(rotary_dim=6).partners(8).tolist() == [3, 4, 5, 0, 1, 2, 6, 7]
    assert RotaryPairs(rotary_dim=6, interleaved=True).partners(8).tolist() == [1, 0, 3, 2, 5, 4, 6, 7]
    assert RotaryPairs(rotary_dim=0).partners(3).tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(half=st.integers(1, 5), free=st.integers(0, 3), interleaved=st.booleans(), seed=st.integers(0, 1000))
def test_tied_scales_commute_with_the_rotation_and_others_do_not(
    half: int, free: int, interleaved: bool, seed: int
) -> None:
    pairs, head_dim = RotaryPairs(rotary_dim=2 * half, interleaved=interleaved), 2 * half + free
    generator = torch.Generator().manual_seed(seed)
    key_D = torch.randn(head_dim, generator=generator, dtype=torch.float64) + 3
    scale_D = torch.rand(head_dim, generator=generator, dtype=torch.float64) + 0.5
    tied_D = torch.maximum(scale_D, scale_D[pairs.partners(head_dim)])
    angles = [0.5 + number for number in range(half)]
    assert untied_pair(tied_D[None], pairs) is None
    after, before = turned(key_D, pairs, angles) / tied_D, turned(key_D / tied_D, pairs, angles)
    assert torch.allclose(after, before, rtol=0, atol=1e-12)
    tied_D[0] *= 2
    found = untied_pair(torch.stack([tied_D.roll(0), tied_D]), pairs)
    assert found == (0, 0, 1 if interleaved else half)
    assert not torch.allclose(turned(key_D, pairs, angles) / tied_D, turned(key_D / tied_D, pairs, angles))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_first_pair_is_named(interleaved: bool) -> None:
    scale_KD = torch.ones(3, 8)
    scale_KD[2, 5] = 1 + 2**-20
    partner = 4 if interleaved else 1
    pairs = RotaryPairs(rotary_dim=8, interleaved=interleaved)
    assert untied_pair(scale_KD, pairs) == (2, min(5, partner), max(5, partner))
    assert untied_pair(scale_KD, RotaryPairs(rotary_dim=4, interleaved=interleaved)) is None
