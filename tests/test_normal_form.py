"""Turning planes around and putting them in order leaves the weight as it is."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.binary_weights import plane_layout, random_binary, slow_dense, with_floats

from optgptq.normal_form import normal_form


@settings(deadline=None)
@given(
    bits=st.integers(1, 8),
    columns=st.integers(1, 70),
    group_size=st.sampled_from([-1, 7, 32]),
    seed=st.integers(0, 1000),
)
def test_the_dense_matrix_stays(bits: int, columns: int, group_size: int, seed: int) -> None:
    weight = random_binary(plane_layout(rows=3, columns=columns, bits=bits, group_size=group_size), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    alpha_OGP = torch.randn(3, weight.num_groups, bits, generator=generator)
    offset_OG = torch.randn(3, weight.num_groups, generator=generator)
    before = with_floats(weight, alpha_OGP, offset_OG)
    codes_OI, normal_OGP = normal_form(weight.codes_OI, alpha_OGP, group_size=weight.group_size)
    assert bool((normal_OGP >= 0).all())
    assert bool((normal_OGP.diff(dim=2) <= 0).all())
    assert torch.equal(normal_OGP, alpha_OGP.abs().sort(dim=2, descending=True).values)
    after = replace(with_floats(weight, normal_OGP, offset_OG), codes_OI=codes_OI)
    torch.testing.assert_close(slow_dense(after), slow_dense(before), rtol=0, atol=1e-12)


def test_bit_equal_where_sums_are_exact() -> None:
    weight = random_binary(plane_layout(bits=4), seed=1)
    whole_OGP = torch.randint(-50, 50, (5, 2, 4), generator=torch.Generator().manual_seed(2)).float()
    before = with_floats(weight, whole_OGP, torch.ones(5, 2))
    codes_OI, normal_OGP = normal_form(weight.codes_OI, whole_OGP, group_size=32)
    after = replace(with_floats(weight, normal_OGP, torch.ones(5, 2)), codes_OI=codes_OI)
    assert torch.equal(after.dequantize(), before.dequantize())


def test_a_weight_in_normal_form_does_not_change() -> None:
    weight = random_binary(plane_layout(bits=3), seed=4)
    alpha_OGP, _ = weight.coefficients.values()
    kept = weight.codes_OI.clone()
    codes_OI, normal_OGP = normal_form(weight.codes_OI, alpha_OGP, group_size=32)
    assert torch.equal(codes_OI, kept)
    assert torch.equal(weight.codes_OI, kept)
    assert torch.equal(normal_OGP, alpha_OGP)


def test_by_hand() -> None:
    """Coefficients -1 and 2: plane 1 becomes the first, plane 0 the second and turned around."""
    codes_OI = torch.tensor([[0b00, 0b01, 0b10, 0b11]], dtype=torch.uint8)
    normal_OI, alpha_OGP = normal_form(codes_OI, torch.tensor([[[-1, 2]]], dtype=torch.int8), group_size=4)
    assert normal_OI.tolist() == [[0b10, 0b00, 0b11, 0b01]]
    assert alpha_OGP.tolist() == [[[2, 1]]]
    assert alpha_OGP.dtype == torch.int8
