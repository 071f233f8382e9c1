"""Uniform grids as sums of signs and back: not one bit of the dequantized weight changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.binary_weights import plane_layout, random_binary, with_floats
from support.checkpoints import random_weight, same_weight

from optgptq.affine_weight import AffineWeight
from optgptq.binary_weight import BinaryWeight
from optgptq.coefficients import FloatCoefficients
from optgptq.convert_weight import affine_weight, binary_weight, weight_for
from optgptq.errors import ExitCode, TargetError
from optgptq.formats import FORMATS
from optgptq.layout import LinearLayout

NAME = "model.layers.0.mlp.down_proj"


def uniform_layout(
    *, bits: int = 4, rows: int = 5, columns: int = 96, group_size: int = 32, symmetric: bool = False
) -> LinearLayout:
    return LinearLayout(
        name=NAME, out_features=rows, in_features=columns, bits=bits, group_size=group_size, symmetric=symmetric
    )


def affine(layout: LinearLayout, *, seed: int = 0, dtype: torch.dtype = torch.float16) -> AffineWeight:
    """Random, every other scale negative, scales with all bits of float16."""
    weight = random_weight(layout, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    sign_OG = torch.randint(0, 2, weight.scale_OG.shape, generator=generator) * 2 - 1
    scale_OG = (torch.rand(weight.scale_OG.shape, generator=generator) + 1e-3).half() * sign_OG
    return replace(weight, scale_OG=scale_OG.to(dtype))


def bit_equal(first: AffineWeight | BinaryWeight, second: AffineWeight | BinaryWeight) -> bool:
    return torch.equal(first.dequantize(), second.dequantize())


@settings(deadline=None)
@given(
    bits=st.integers(1, 4),
    rows=st.integers(1, 6),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([-1, 32, 64]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_there_and_back(bits: int, rows: int, groups: int, group_size: int, symmetric: bool, seed: int) -> None:
    columns = 45 if group_size == -1 else groups * group_size
    layout = uniform_layout(bits=bits, rows=rows, columns=columns, group_size=group_size, symmetric=symmetric)
    weight = affine(layout, seed=seed)
    signs = binary_weight(weight, layout)
    assert bit_equal(signs, weight)
    assert list(signs.problems()) == []
    alpha_OGP, _ = signs.coefficients.values()
    assert bool((alpha_OGP.diff(dim=2) <= 0).all())
    back = affine_weight(signs, layout, smallest_zero_point=0)
    assert bit_equal(back, weight)
    if symmetric:
        assert same_weight(back.with_scale_dtype(torch.float16), weight)


def test_identity_of_the_special_case() -> None:
    """`s * (Q - z)` in float64 against offset and signs, at every width; research 2.1."""
    for bits in range(1, 5):
        layout = uniform_layout(bits=bits)
        weight = affine(layout, seed=bits)
        alpha_OGP, offset_OG = (values.double() for values in binary_weight(weight, layout).coefficients.values())
        scale_OG, zero_OG = weight.scale_OG.double(), weight.zero_point_OG.double()
        assert torch.equal(offset_OG, scale_OG * ((2**bits - 1) / 2 - zero_OG))
        for plane in range(bits):
            assert torch.equal(alpha_OGP[:, :, plane], scale_OG.abs() * 2.0 ** (bits - 1 - plane) / 2)


def test_act_order_becomes_a_column_order() -> None:
    layout = uniform_layout()
    index_I = torch.randperm(96, generator=torch.Generator().manual_seed(1)).to(torch.int32) % 3
    weight = replace(affine(layout), group_index_I=index_I)
    signs = binary_weight(weight, layout)
    assert signs.column_order_I is not None
    assert signs.column_order_I.dtype == torch.int32
    assert index_I[signs.column_order_I.long()].tolist() == [0] * 32 + [1] * 32 + [2] * 32
    assert bit_equal(signs, weight)
    back = affine_weight(signs, layout, smallest_zero_point=0)
    assert back.group_index_I is not None
    assert torch.equal(back.group_index_I, index_I)
    assert bit_equal(back, weight)


def test_a_column_order_within_groups_leaves_no_act_order() -> None:
    layout = uniform_layout()
    signs = binary_weight(affine(layout), layout)
    order_I = torch.arange(96, dtype=torch.int32).reshape(3, 32).flip(1).reshape(-1)
    moved = replace(signs, codes_OI=signs.codes_OI[:, order_I.long()], column_order_I=order_I)
    assert bit_equal(moved, signs)
    back = affine_weight(moved, layout, smallest_zero_point=0)
    assert back.group_index_I is None
    assert bit_equal(back, signs)


def test_unequal_act_order_groups_are_refused() -> None:
    layout = uniform_layout()
    index_I = torch.arange(96, dtype=torch.int32) // 32
    index_I[0] = 1
    with pytest.raises(TargetError, match=r"32 columns in each group .* found 31 to 33") as caught:
        binary_weight(replace(affine(layout), group_index_I=index_I), layout)
    assert caught.value.where == NAME
    assert caught.value.exit_code == ExitCode.TARGET


@pytest.mark.parametrize(
    ("layout", "expected", "action"),
    [
        (uniform_layout(bits=5), "1 to 4 bits", "another width"),
        (uniform_layout(group_size=16), "a group size of -1, or a multiple of 32 that divides its 96", "group size 32"),
        (uniform_layout(columns=100, group_size=50), "multiple of 32 that divides its 100", "group size -1"),
        (uniform_layout(columns=384, group_size=144), "multiple of 32 that divides its 384", "group size 128"),
    ],
)
def test_what_planes_cannot_hold_is_refused(layout: LinearLayout, expected: str, action: str) -> None:
    with pytest.raises(TargetError) as caught:
        binary_weight(random_weight(layout), layout)
    assert expected in caught.value.expected
    assert action in caught.value.action


def test_coefficients_of_other_ratios_are_refused() -> None:
    layout = plane_layout()
    with pytest.raises(TargetError, match="of 10 groups 10 with coefficients of other ratios") as caught:
        affine_weight(random_binary(layout), layout, smallest_zero_point=0)
    assert caught.value.where == layout.name


@pytest.mark.parametrize(("offset", "zero"), [(0.25, None), (20.5, None), (0.5, 1), (-1.5, 3), (1.5, 0), (-2.5, 4)])
def test_zero_points_are_whole_and_in_range(offset: float, zero: int | None) -> None:
    layout = plane_layout(rows=1, columns=32, bits=2)
    alpha_OGP = torch.tensor([[[1.0, 0.5]]])
    weight = with_floats(random_binary(layout), alpha_OGP, torch.tensor([[offset]]))
    weight = replace(weight, codes_OI=weight.codes_OI[:1])
    if zero is None:
        with pytest.raises(TargetError, match="of 1 groups 1 without a whole zero point in range"):
            affine_weight(weight, layout, smallest_zero_point=0)
        return
    back = affine_weight(weight, layout, smallest_zero_point=0)
    if zero == 1:
        # A zero point beside the middle is the middle of the grid that is turned around.
        assert (int(back.zero_point_OG), float(back.scale_OG)) == (2, -1.0)
    else:
        assert (int(back.zero_point_OG), float(back.scale_OG)) == (zero, 1.0)
    assert bit_equal(back, weight)


def test_a_zero_point_below_the_smallest_turns_the_grid_around() -> None:
    layout = plane_layout(rows=1, columns=32, bits=2)
    weight = with_floats(random_binary(layout), torch.tensor([[[1.0, 0.5]]]), torch.tensor([[1.5]]))
    weight = replace(weight, codes_OI=weight.codes_OI[:1])
    back = affine_weight(weight, layout, smallest_zero_point=1)
    assert (int(back.zero_point_OG), float(back.scale_OG)) == (3, -1.0)
    assert bit_equal(back, weight)


def test_groups_of_zeros() -> None:
    layout = uniform_layout()
    weight = affine(layout)
    weight.scale_OG[2] = 0
    signs = binary_weight(weight, layout)
    assert bit_equal(signs, weight)
    assert bit_equal(affine_weight(signs, layout, smallest_zero_point=0), weight)
    alpha_OGP, offset_OG = signs.coefficients.values()
    offset_OG[2, 1] = 1.0
    constant = replace(signs, coefficients=FloatCoefficients(alpha_OGP, offset_OG))
    with pytest.raises(TargetError, match="of 15 groups 1 without a whole zero point"):
        affine_weight(constant, layout, smallest_zero_point=0)


def test_each_format_gets_its_kind_of_weight() -> None:
    layout = uniform_layout()
    weight = affine(layout)
    assert weight_for(FORMATS["gptq"], weight, layout) is weight
    signs = weight_for(FORMATS["optgptq"], weight, layout)
    assert isinstance(signs, BinaryWeight)
    assert weight_for(FORMATS["optgptq"], signs, layout) is signs
    assert isinstance(weight_for(FORMATS["gptq_v2"], signs, layout), AffineWeight)


def test_scales_of_all_of_float32_may_round_and_are_refused_then() -> None:
    layout = uniform_layout(rows=64)
    generator = torch.Generator().manual_seed(0)
    fine = replace(random_weight(layout), scale_OG=torch.rand(64, 3, generator=generator))
    with pytest.raises(TargetError, match="differ by rounding"):
        weight_for(FORMATS["optgptq"], fine, layout)
