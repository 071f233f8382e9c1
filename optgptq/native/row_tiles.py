"""Codes as the compiled products read them: tiles of 16 rows, blocks of 32 columns (`source/products.hpp`).

Shapes: `O` output rows, `I` input columns, filled up to whole tiles and blocks; `T` tiles, `B` blocks, `C` chunks of 64
bytes in a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optgptq.native.large_pages import large_page_empty

TILE_ROWS = 16
BLOCK_COLUMNS = 32
# Widths that have a layout of their own.
WIDTHS = (1, 2, 3, 4, 8)
_QUADS = 8
_CHUNK = 64


def filled_rows(num_rows: int) -> int:
    """Return how many rows whole tiles have."""
    return -(-num_rows // TILE_ROWS) * TILE_ROWS


def pack_row_tiles(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes `[O, I]` of `bits` bits as uint8 `[T, B, C, 64]`; `I` is a multiple of 32, rows are filled up."""
    rows, columns = codes_OI.shape
    assert columns % BLOCK_COLUMNS == 0
    assert bits in WIDTHS
    tiles = filled_rows(rows) // TILE_ROWS
    packed_TBCX = large_page_empty((tiles, columns // BLOCK_COLUMNS, bits, _CHUNK), torch.uint8)
    # A few tiles at a time: what is made in between stays in the cache.
    step = max(1, (1 << 20) // (TILE_ROWS * columns))
    for begin in range(0, tiles, step):
        some_OI = codes_OI[begin * TILE_ROWS : (begin + step) * TILE_ROWS].to(torch.uint8)
        missing = -some_OI.shape[0] % TILE_ROWS
        if missing:
            some_OI = torch.nn.functional.pad(some_OI, (0, 0, 0, missing))
        quads = some_OI.reshape(-1, TILE_ROWS, columns // BLOCK_COLUMNS, _QUADS, 4).permute(0, 2, 3, 1, 4)
        packed_TBCX[begin : begin + step] = _packed(quads.reshape(*quads.shape[:3], _CHUNK), bits)
    return packed_TBCX


def unpack_row_tiles(packed_TBCX: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes `[O, I]` of all rows and columns, with their filling, as uint8."""
    quads = _unpacked(packed_TBCX, bits)
    tiles, blocks = packed_TBCX.shape[:2]
    codes = quads.reshape(tiles, blocks, _QUADS, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
    return codes.reshape(tiles * TILE_ROWS, blocks * BLOCK_COLUMNS)


def stack_row_tiles(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return packed codes of the same columns as one, tile below tile."""
    stacked_TBCX = large_page_empty((sum(len(part) for part in parts), *parts[0].shape[1:]), torch.uint8)
    return torch.cat(tuple(parts), out=stacked_TBCX)


def _packed(quads: torch.Tensor, bits: int) -> torch.Tensor:
    """Return quads `[T, B, 8, 64]` as chunks `[T, B, C, 64]`: quad `c + C * i` at bit `bits * i` of chunk `c`."""
    if bits == 3:
        return torch.cat((_packed(quads & 3, 2), _packed(quads >> 2, 1)), dim=2)
    chunks = quads[:, :, :bits].clone()
    for place in range(1, 8 // bits):
        chunks |= quads[:, :, place * bits : (place + 1) * bits] << (place * bits)
    return chunks


def _unpacked(chunks: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 3:
        return _unpacked(chunks[:, :, :2], 2) | (_unpacked(chunks[:, :, 2:], 1) << 2)
    mask = (1 << bits) - 1
    return torch.cat([(chunks >> (place * bits)) & mask for place in range(8 // bits)], dim=2)
