"""Codes of a few bits in rows of bytes. The order is that of `optgptq.kv_cache.page_layout`.

Shapes: `D` head dimension, `B` bytes of a row; any number of dimensions before them.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

_ROW_ALIGNMENT = 4


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return rows of bytes `[..., B]` of uint8 codes `[..., D]`; 8 divides `D`. Bytes that fill a row up are 0."""
    if bits == 3:
        return torch.cat([_pack_plane(codes & 3, 2), _pack_plane(codes >> 2, 1)], -1)
    return _pack_plane(codes, bits)


def unpack(rows: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    """Return uint8 codes `[..., D]` of uint8 rows of bytes `[..., B]`."""
    if bits == 3:
        lower = _unpack_plane(rows, 2, head_dim)
        return lower | _unpack_plane(rows[..., _filled(head_dim // 4) :], 1, head_dim) << 2
    return _unpack_plane(rows, bits, head_dim)


def _pack_plane(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Part `j` of the channels goes into bits `j * bits` and up of each byte."""
    rows = torch.zeros_like(codes[..., : codes.shape[-1] * bits // 8])
    for part, piece in enumerate(codes.chunk(8 // bits, -1)):
        rows |= piece << part * bits
    return pad(rows, (0, _filled(rows.shape[-1]) - rows.shape[-1]))


def _unpack_plane(rows: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    rows = rows[..., : head_dim * bits // 8]
    return torch.cat([rows >> first & 2**bits - 1 for first in range(0, 8, bits)], -1)


def _filled(num_bytes: int) -> int:
    return -(-num_bytes // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
