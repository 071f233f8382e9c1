"""Where the planes of a page lie, by hand."""

from __future__ import annotations

import itertools

import pytest

from optgptq.kv_cache.page_layout import PageLayout, bits_per_value, row_bytes
from optgptq.kv_cache.scheme import CODE_BITS, LayerScheme, SideScheme


def layout_of(keys: SideScheme, values: SideScheme, *, num_kv_heads: int = 1, head_dim: int = 64) -> PageLayout:
    scheme = LayerScheme(keys=keys, values=values)
    return PageLayout(num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=16, scheme=scheme, exact_bytes=2)


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
def test_four_bits(num_kv_heads: int) -> None:
    side = SideScheme(bits=4, group_size=64)
    layout = layout_of(side, side, num_kv_heads=num_kv_heads)
    assert (layout.key_row_bytes, layout.value_row_bytes) == (32, 32)
    assert (layout.value_codes, layout.key_parameters, layout.value_parameters) == (512, 1024, 1088)
    assert (layout.head_bytes, layout.page_bytes) == (1152, 1152 * num_kv_heads)
    assert layout.bytes_per_token == 72 * num_kv_heads


def test_three_bit_keys_in_halves_and_two_bit_values() -> None:
    # 24 channels: 6 bytes of lower bits, filled up to 8, and 3 of third bits, filled up to 4; values 6, filled up to 8.
    layout = layout_of(SideScheme(bits=3, group_size=12), SideScheme(bits=2, group_size=24), head_dim=24)
    assert (layout.key_row_bytes, layout.value_row_bytes) == (12, 8)
    assert (layout.value_codes, layout.key_parameters, layout.value_parameters) == (192, 320, 448)
    assert layout.head_bytes == 512


def test_groups_along_tokens_and_an_exact_side() -> None:
    keys, values = SideScheme(bits=2, group_size=8, axis="token"), SideScheme()
    layout = layout_of(keys, values, head_dim=40)
    assert (layout.key_row_bytes, layout.value_row_bytes) == (12, 80)
    assert (layout.value_codes, layout.key_parameters) == (192, 192 + 1280)
    assert layout.value_parameters == layout.key_parameters + 2 * 40 * 4
    assert layout.head_bytes == layout.value_parameters


@pytest.mark.parametrize(("keys", "values"), list(itertools.product((*CODE_BITS, 16), repeat=2)))
def test_planes_are_aligned_and_none_overlap(keys: int, values: int) -> None:
    layout = layout_of(
        SideScheme(bits=keys, group_size=20), SideScheme(bits=values, group_size=40), num_kv_heads=3, head_dim=40
    )
    ends = [
        16 * layout.key_row_bytes,
        layout.value_codes + 16 * layout.value_row_bytes,
        layout.key_parameters + (0 if keys == 16 else 16 * 2 * 4),
        layout.value_parameters + (0 if values == 16 else 16 * 4),
    ]
    starts = [layout.value_codes, layout.key_parameters, layout.value_parameters, layout.head_bytes]
    assert all(start % 16 == 0 and 0 <= start - end < 16 for start, end in zip(starts, ends, strict=True))


def test_bits() -> None:
    assert bits_per_value(SideScheme(bits=4, group_size=128), 128) == 4.25
    assert bits_per_value(SideScheme(bits=2, group_size=32, axis="token"), 64) == 3.0
    assert bits_per_value(SideScheme(), 24) == 16.0
    # Two planes of 16 channels in 3 bits are filled up to 4 bytes each.
    assert bits_per_value(SideScheme(bits=3, group_size=16), 16) == 4 + 32 / 16
    assert bits_per_value(SideScheme(bits=3, group_size=32), 32) == 3 + 32 / 32
    assert row_bytes(SideScheme(), 24, 4) == 96
