"""The planes of pages of codes as tensors that share their memory, and vectors written into and read out of them.

Where each plane lies: `optgptq.kv_cache.page_layout`.

Shapes: `Z` pages, `B` bytes of a page, `K` key/value heads, `D` head dimension, `Y` slots of a page, `T` tokens.
"""

from __future__ import annotations

from typing import Literal

import torch

from optgptq.kv_cache.codec import Codes, SideCodec, decode, encode
from optgptq.kv_cache.packing import pack, unpack
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.scheme import SideScheme

Side = Literal["keys", "values"]
SIDES: tuple[Side, ...] = ("keys", "values")


def side_scheme(layout: PageLayout, side: Side) -> SideScheme:
    """Return what is stored of a side."""
    return layout.scheme.keys if side == "keys" else layout.scheme.values


def code_plane(pages_ZB: torch.Tensor, layout: PageLayout, side: Side) -> torch.Tensor:
    """Return the rows of codes, a view: uint8 `[Z, K, Y, row_bytes]`."""
    begin, num_bytes = (0, layout.key_row_bytes) if side == "keys" else (layout.value_codes, layout.value_row_bytes)
    heads = pages_ZB.view(-1, layout.num_kv_heads, layout.head_bytes)
    plane = heads.narrow(2, begin, layout.page_size * num_bytes)
    return plane.view(*heads.shape[:2], layout.page_size, num_bytes)


def parameter_plane(pages_ZB: torch.Tensor, layout: PageLayout, side: Side) -> torch.Tensor:
    """Return pairs of scale and minimum of a side that is not exact, a view.

    Float16 `[Z, K, Y, D / group_size, 2]`, or `[Z, K, Y / group_size, D, 2]` with groups along tokens.
    """
    scheme = side_scheme(layout, side)
    shape = (layout.page_size, layout.head_dim // scheme.group_size, 2)
    if scheme.axis == "token":
        shape = (layout.page_size // scheme.group_size, layout.head_dim, 2)
    begin = layout.key_parameters if side == "keys" else layout.value_parameters
    heads = pages_ZB.view(torch.float16).view(-1, layout.num_kv_heads, layout.head_bytes // 2)
    return heads.narrow(2, begin // 2, shape[0] * shape[1] * 2).view(*heads.shape[:2], *shape)


def write_vectors(
    x_TKD: torch.Tensor,
    pages_ZB: torch.Tensor,
    slot_T: torch.Tensor,
    *,
    layout: PageLayout,
    side: Side,
    codec: SideCodec | None,
) -> None:
    """Store vectors, as they are where there is no codec.

    Args:
        x_TKD: with groups along tokens whole groups, each in the slots of one group.
        slot_T: `page * page_size + slot` of each.
    """
    page_T, place_T = slot_T // layout.page_size, slot_T % layout.page_size
    rows_ZKYB = code_plane(pages_ZB, layout, side)
    if codec is None:
        assert x_TKD.element_size() == layout.exact_bytes
        rows_ZKYB[page_T, :, place_T] = x_TKD.contiguous().view(torch.uint8)
        return
    codes = encode(x_TKD, codec)
    rows_ZKYB[page_T, :, place_T] = pack(codes.code_TKD, codec.scheme.bits)
    if codec.scheme.axis == "token":
        page_T, place_T = page_T[:: codec.scheme.group_size], place_T[:: codec.scheme.group_size]
        place_T = place_T // codec.scheme.group_size
    pairs = torch.stack([codes.scale_TKG, codes.minimum_TKG], -1)
    parameter_plane(pages_ZB, layout, side)[page_T, :, place_T] = pairs


def read_vectors(pages_ZB: torch.Tensor, *, layout: PageLayout, side: Side, exact_dtype: torch.dtype) -> torch.Tensor:
    """Return all vectors of the pages, `[Z * Y, K, D]`, float32, those of an exact side in `exact_dtype`."""
    scheme = side_scheme(layout, side)
    rows_TKB = code_plane(pages_ZB, layout, side).transpose(1, 2).flatten(0, 1)
    if scheme.is_exact:
        assert exact_dtype.itemsize == layout.exact_bytes
        return rows_TKB.contiguous().view(exact_dtype)
    scale_TKG, minimum_TKG = parameter_plane(pages_ZB, layout, side).transpose(1, 2).flatten(0, 1).unbind(-1)
    code_TKD = unpack(rows_TKB, scheme.bits, layout.head_dim)
    return decode(Codes(code_TKD=code_TKD, scale_TKG=scale_TKG, minimum_TKG=minimum_TKG), scheme)
