"""Codes in bytes: rows worked out by hand, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kv_cache import row_by_hand

from optgptq.kv_cache.packing import pack, unpack
from optgptq.kv_cache.page_layout import row_bytes
from optgptq.kv_cache.scheme import CODE_BITS, SideScheme

GOLDEN = {
    # Channel c in the low half of byte c, channel c + 4 in its high half.
    4: ([1, 2, 3, 4, 5, 6, 7, 15], [0x51, 0x62, 0x73, 0xF4]),
    # Byte 0: channels 0, 2, 4, 6 from its lowest bits up; two bytes to fill up.
    2: ([1, 0, 2, 3, 3, 1, 0, 2], [0b00_11_10_01, 0b10_01_11_00, 0, 0]),
    # The lower two bits as above, filled up; then the third bits of all channels, filled up.
    3: ([1, 4, 2, 7, 3, 5, 0, 6], [0b00_11_10_01, 0b10_01_11_00, 0, 0, 0b10101010, 0, 0, 0]),
    8: ([0, 255, 3, 4, 5, 6, 7, 128], [0, 255, 3, 4, 5, 6, 7, 128]),
}


@pytest.mark.parametrize("bits", CODE_BITS)
def test_rows_by_hand(bits: int) -> None:
    codes, expected = GOLDEN[bits]
    found = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert (found.dtype, found.tolist()) == (torch.uint8, expected)


@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_all_codes_come_back(bits: int, head_dim: int) -> None:
    codes = torch.arange(head_dim * 2**bits).view(2**bits, head_dim)
    codes = ((codes + codes // head_dim) % 2**bits).to(torch.uint8)
    rows = pack(codes, bits)
    assert rows.shape == (2**bits, row_bytes(SideScheme(bits=bits, group_size=head_dim), head_dim, 2))
    assert torch.equal(unpack(rows, bits, head_dim), codes)
    by_hand = row_by_hand(codes[-1], bits)
    assert torch.equal(rows[-1, : len(by_hand)], by_hand)
    assert not rows[-1, len(by_hand) :].any()


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(CODE_BITS), eighth=st.integers(1, 20), data=st.data())
def test_any_row_comes_back_whatever_fills_it_up(bits: int, eighth: int, data: st.DataObject) -> None:
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=8 * eighth, max_size=8 * eighth)))
    rows = pack(codes.to(torch.uint8), bits)
    is_used = pack(torch.full_like(codes, 2**bits - 1).to(torch.uint8), bits) != 0
    assert torch.equal(unpack(torch.where(is_used, rows, 0xFF), bits, 8 * eighth), codes.to(torch.uint8))
