"""Scales that every engine can store, and nearest codes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optgptq.grids.affine import LARGEST_SCALE, SMALLEST_SCALE, nearest_codes, storable_scale

NUMBERS = st.floats(allow_nan=False, width=64) | st.floats(min_value=-2.0, max_value=2.0, width=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(value=NUMBERS)
def test_scales_are_exact_in_float16_and_bfloat16(dtype: torch.dtype, value: float) -> None:
    given_scale = torch.tensor([value], dtype=dtype)
    scale = storable_scale(given_scale)
    assert scale.dtype == dtype
    for stored in (torch.float16, torch.bfloat16):
        assert torch.equal(scale.to(stored).to(dtype), scale)
    assert SMALLEST_SCALE <= abs(float(scale)) <= LARGEST_SCALE
    if float(given_scale) != 0:
        assert math.copysign(1, float(scale)) == math.copysign(1, value)
    assert torch.equal(storable_scale(scale), scale)


@given(value=st.floats(min_value=2.0**-14, max_value=LARGEST_SCALE, width=32), negative=st.booleans())
def test_scales_move_by_half_a_bfloat16_step_at_most(value: float, negative: bool) -> None:
    scale = storable_scale(torch.tensor(-value if negative else value))
    assert abs(abs(float(scale)) / value - 1) <= 2.0**-8


@given(value=st.floats(min_value=0, max_value=2.0**-14, width=32))
def test_small_scales_move_by_the_spacing_of_float16_besides(value: float) -> None:
    assert abs(float(storable_scale(torch.tensor(value))) - value) <= value * 2.0**-8 + 2.0**-24


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 2.0**-24),
        (-0.0, 2.0**-24),
        (1e-45, 2.0**-24),
        (-1e-45, -(2.0**-24)),
        (1e38, 65280.0),
        (-math.inf, -65280.0),
        (65504.0, 65280.0),
        (1.0, 1.0),
        (1.00390625, 1.0),
        (3 * 2.0**-24, 3 * 2.0**-24),
    ],
)
def test_scales_at_the_edges(value: float, expected: float) -> None:
    assert float(storable_scale(torch.tensor(value))) == expected


def test_nearest_codes_are_clamped_into_the_grid() -> None:
    weight = torch.tensor([-9.0, -2.6, -2.4, 0.0, 1.4, 99.0])
    codes, endless = nearest_codes(weight, torch.tensor(1.0), torch.tensor(3.0), 7)
    assert codes.tolist() == [0, 0, 1, 3, 4, 7]
    assert endless.tolist() == [-6, 0, 1, 3, 4, 102]
    turned, _ = nearest_codes(weight, torch.tensor(-1.0), torch.tensor(3.0), 7)
    assert turned.tolist() == [7, 6, 5, 3, 2, 0]
