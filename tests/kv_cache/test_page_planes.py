"""Vectors in pages: bytes at addresses worked out by hand, nothing written beside them, and back."""

from __future__ import annotations

import struct

import pytest
import torch
from support.kv_cache import EXACT, layer_schemes, random_codec, row_by_hand

from optgptq.kv_cache.codec import SideCodec, decode, encode
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.page_planes import SIDES, read_vectors, side_scheme, write_vectors
from optgptq.kv_cache.scheme import LayerScheme, SideScheme
from optgptq.kv_cache.setup import SideParameters

FILL = 0xA5


def test_a_page_by_hand() -> None:
    """Two heads of 8 channels, 4-bit keys and exact float16 values; the token in slot 3 of page 1."""
    side = SideScheme(bits=4, group_size=8)
    layout = PageLayout(
        num_kv_heads=2, head_dim=8, page_size=16, scheme=LayerScheme(keys=side, values=EXACT), exact_bytes=2
    )
    # Keys 16 * 4, values 16 * 16, parameters 16 * 4.
    assert (layout.value_codes, layout.key_parameters, layout.head_bytes) == (64, 320, 384)
    pages_ZB = torch.full((2, 768), FILL, dtype=torch.uint8)
    # Scale 2 and minimum -3: codes 0 to 7 and 15.
    key_TKD = torch.tensor([-3.0, -1, 1, 3, 5, 7, 9, 27]).repeat(1, 2, 1)
    value_TKD = torch.arange(16.0).half().view(1, 2, 8)
    slot_T = torch.tensor([16 + 3])
    codec = SideCodec.of(side, SideParameters(), torch.device("cpu"))
    write_vectors(key_TKD, pages_ZB, slot_T, layout=layout, side="keys", codec=codec)
    write_vectors(value_TKD, pages_ZB, slot_T, layout=layout, side="values", codec=None)
    expected = [FILL] * 768
    for head in range(2):
        begin = head * 384
        expected[begin + 12 : begin + 16] = [0x40, 0x51, 0x62, 0xF3]
        expected[begin + 64 + 48 : begin + 64 + 64] = struct.pack("<8e", *range(head * 8, head * 8 + 8))
        expected[begin + 320 + 12 : begin + 320 + 16] = struct.pack("<2e", 2.0, -3.0)
    assert pages_ZB[1].tolist() == expected
    assert bool((pages_ZB[0] == FILL).all())


def test_groups_along_tokens_by_hand() -> None:
    """One head of 8 channels; 2-bit keys, tokens 8 to 15 of a page as one group."""
    side = SideScheme(bits=2, group_size=8, axis="token")
    values = SideScheme(bits=8, group_size=4)
    layout = PageLayout(
        num_kv_heads=1, head_dim=8, page_size=16, scheme=LayerScheme(keys=side, values=values), exact_bytes=4
    )
    assert (layout.value_codes, layout.key_parameters, layout.value_parameters) == (64, 192, 256)
    pages_ZB = torch.full((1, layout.page_bytes), FILL, dtype=torch.uint8)
    # Channel d: its minimum is d, its scale d + 1, the codes of the tokens 0 1 2 3 0 1 2 3.
    code_T, channel_D = torch.arange(8) % 4, torch.arange(8)
    key_TKD = (code_T.unsqueeze(1) * (channel_D + 1) + channel_D).float().unsqueeze(1)
    codec = SideCodec.of(side, SideParameters(), torch.device("cpu"))
    write_vectors(key_TKD, pages_ZB, torch.arange(8, 16), layout=layout, side="keys", codec=codec)
    expected = [FILL] * layout.page_bytes
    for token in range(8):
        byte = 0b01010101 * (token % 4)
        expected[(8 + token) * 4 : (9 + token) * 4] = [byte, byte, 0, 0]
    pairs = [number for channel in range(8) for number in (channel + 1.0, float(channel))]
    expected[192 + 32 : 192 + 64] = struct.pack("<16e", *pairs)
    assert pages_ZB[0].tolist() == expected
    read_TKD = read_vectors(pages_ZB, layout=layout, side="keys", exact_dtype=torch.float32)
    assert torch.equal(read_TKD[8:], key_TKD)


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [24, 64])
@pytest.mark.parametrize("name", layer_schemes(24))
def test_what_is_written_is_read(name: str, head_dim: int, num_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = PageLayout(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=32,
        scheme=layer_schemes(head_dim)[name],
        exact_bytes=2,
    )
    pages_ZB = torch.full((5, layout.page_bytes), FILL, dtype=torch.uint8)
    slot_T = torch.cat([torch.arange(page * 32 + first, page * 32 + first + 16) for page, first in ((3, 16), (1, 0))])
    for side in SIDES:
        scheme = side_scheme(layout, side)
        codec = None if scheme.is_exact else random_codec(scheme, num_kv_heads, head_dim, False, generator)
        x_TKD = torch.randn(32, num_kv_heads, head_dim, generator=generator).bfloat16()
        before = read_vectors(pages_ZB, layout=layout, side=side, exact_dtype=torch.bfloat16)
        write_vectors(x_TKD, pages_ZB, slot_T, layout=layout, side=side, codec=codec)
        found = read_vectors(pages_ZB, layout=layout, side=side, exact_dtype=torch.bfloat16)
        expected = x_TKD if codec is None else decode(encode(x_TKD, codec), scheme)
        assert torch.equal(found[slot_T], expected)
        others = torch.ones(len(found), dtype=torch.bool)
        others[slot_T] = False
        assert torch.equal(found[others], before[others])
        if codec is not None:
            row = row_by_hand(encode(x_TKD, codec).code_TKD[20, -1], scheme.bits)
            first = (num_kv_heads - 1) * layout.head_bytes + (0 if side == "keys" else layout.value_codes)
            first += 4 * (layout.key_row_bytes if side == "keys" else layout.value_row_bytes)
            assert torch.equal(pages_ZB[1, first : first + len(row)], row)
    assert bool((pages_ZB[[0, 2, 4]] == FILL).all())
