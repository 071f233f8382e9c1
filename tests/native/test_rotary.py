"""Rotary positions of the native library against the same in torch, bit by bit."""

from __future__ import annotations

import pytest
import torch

from optgptq.native.library import load_library
from optgptq.native.rotary import rotate_heads, rotates_heads

pytestmark = pytest.mark.skipif(load_library() is None, reason="the native library was not built")


def _in_torch(heads_BSND: torch.Tensor, cosine_S1H: torch.Tensor, sine_S1H: torch.Tensor) -> torch.Tensor:
    half = cosine_S1H.shape[-1]
    first, second, rest = heads_BSND.split([half, half, heads_BSND.shape[-1] - 2 * half], dim=-1)
    # Each product and each sum is a tensor of its own, so each is rounded; but for the second product of a sum.
    turned = (first * cosine_S1H).float() - second.float() * sine_S1H.float()
    other = (second * cosine_S1H).float() + first.float() * sine_S1H.float()
    return torch.cat((turned.bfloat16(), other.bfloat16(), rest), dim=-1)


def _case(shape: tuple[int, int, int, int], half: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + half)
    angles_S1H = 7 * torch.randn(shape[1], 1, half, generator=generator)
    return torch.randn(shape, generator=generator).bfloat16(), angles_S1H.cos().bfloat16(), angles_S1H.sin().bfloat16()


@pytest.mark.parametrize(("shape", "half"), [((2, 5, 3, 32), 16), ((1, 1, 1, 2), 1), ((3, 130, 2, 80), 10)])
def test_bits_are_those_of_torch(shape: tuple[int, int, int, int], half: int) -> None:
    heads, cosine, sine = _case(shape, half)
    expected = _in_torch(heads, cosine, sine)
    assert rotates_heads(heads, cosine, sine)
    rotate_heads(heads, cosine, sine)
    assert torch.equal(heads, expected)


def test_heads_of_a_fused_projection_are_rotated_where_they_lie() -> None:
    fused, cosine, sine = _case((2, 7, 6, 32), 16)
    expected = fused.clone()
    expected[:, :, 1:3] = _in_torch(fused[:, :, 1:3], cosine, sine)
    rotate_heads(fused[:, :, 1:3], cosine, sine)
    assert torch.equal(fused, expected)


def test_threads_change_no_bit() -> None:
    heads, cosine, sine = _case((4, 1000, 16, 64), 32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(heads.clone())
            rotate_heads(results[-1], cosine, sine)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_only_what_fits_is_taken() -> None:
    heads, cosine, sine = _case((2, 5, 3, 32), 16)
    assert rotates_heads(heads, cosine, sine)
    assert not rotates_heads(heads.float(), cosine, sine)
    assert not rotates_heads(heads, cosine.float(), sine.float())
    assert not rotates_heads(heads, cosine.expand(2, -1, -1, -1), sine.expand(2, -1, -1, -1))
    assert not rotates_heads(heads.transpose(2, 3), cosine, sine)
    assert not rotates_heads(heads.requires_grad_(), cosine, sine)
