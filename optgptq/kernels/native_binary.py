"""Products with sign planes by compiled loops on a processor: tiles of rows, made once when a model is loaded.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `P` planes; `T` tiles of 16 rows, `R` the rows of a
tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.binary_weight import BinaryWeight
from optgptq.errors import FormatError
from optgptq.kernels.packed_binary import fits_words
from optgptq.native.binary_products import MOST_PLANES, BinaryTiles, binary_product
from optgptq.native.row_tiles import (
    BLOCK_COLUMNS,
    TILE_ROWS,
    filled_rows,
    pack_row_tiles,
    stack_row_tiles,
    unpack_row_tiles,
)

# From so many tokens on, exact products are those of torch with rows that are decoded once for all tokens.
_DENSE_FROM_TOKENS = 16
_WEIGHTS_PER_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class NativeBinary:
    """A weight in binary coding, for the compiled loops. Built by `pack_native_binary`.

    Attributes:
        tiles: planes and coefficients.
        group_size: columns in a group: a multiple of 32, or at least `I` where one group spans the row.
        column_order_I: int64, the input column that each column of the tiles takes; None: they are in order.
    """

    tiles: BinaryTiles
    group_size: int
    column_order_I: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows `O`."""
        return self.tiles.num_rows

    @property
    def in_features(self) -> int:
        """Columns `I`."""
        return self.tiles.num_columns

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight."""
        return self.tiles.codes_TBPX.nbytes + self.tiles.alpha_TGPR.nbytes + self.tiles.offset_TGR.nbytes

    def stacks_with(self, other: NativeBinary) -> bool:
        """True if `stacked` may join the two: whole tiles, and nothing but the rows differs."""
        mine_I, its_I = self.column_order_I, other.column_order_I
        same_order = mine_I is its_I or (mine_I is not None and its_I is not None and torch.equal(mine_I, its_I))
        whole = self.out_features % TILE_ROWS == 0 and other.out_features % TILE_ROWS == 0
        return same_order and whole and self._shape() == other._shape()

    @classmethod
    def stacked(cls, parts: Sequence[NativeBinary]) -> NativeBinary:
        """Return weights of which each `stacks_with` the first as one, row below row."""
        tiles = [part.tiles for part in parts]
        joined = replace(
            tiles[0],
            codes_TBPX=stack_row_tiles([tile.codes_TBPX for tile in tiles]),
            alpha_TGPR=torch.cat([tile.alpha_TGPR for tile in tiles]),
            offset_TGR=torch.cat([tile.offset_TGR for tile in tiles]),
            num_rows=sum(tile.num_rows for tile in tiles),
        )
        return replace(parts[0], tiles=joined)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight `[O, I]`, columns in the model's order: to the bit what it was packed from gives."""
        dense_OI = self._dense_rows(0, self.tiles.codes_TBPX.shape[0]).to(dtype)
        if self.column_order_I is None:
            return dense_OI
        return torch.empty_like(dense_OI).index_copy_(1, self.column_order_I, dense_OI)

    def _dense_rows(self, begin: int, end: int) -> torch.Tensor:
        """Return the rows of tiles `begin` to before `end` in float32, columns in the order of the tiles.

        Sums in the order of `BinaryWeight.levels`, so that every number is the same to the bit.
        """
        tiles = self.tiles
        codes_OI = unpack_row_tiles(tiles.codes_TBPX[begin:end], tiles.num_planes)
        codes_OGL = codes_OI.view(codes_OI.shape[0], tiles.num_groups, -1)
        offset_OG = tiles.offset_TGR[begin:end].transpose(1, 2).flatten(0, 1).to(torch.float32)
        alpha_OGP = tiles.alpha_TGPR[begin:end].permute(0, 3, 1, 2).flatten(0, 1).to(torch.float32)
        dense_OGL = offset_OG[:, :, None].expand_as(codes_OGL)
        for plane in range(tiles.num_planes):
            alpha_OG1 = alpha_OGP[:, :, plane, None]
            dense_OGL = dense_OGL + torch.where(codes_OGL & 1 << plane != 0, alpha_OG1, -alpha_OG1)
        return dense_OGL.flatten(1)[: tiles.num_rows - begin * TILE_ROWS, : tiles.num_columns]

    def _shape(self) -> tuple[object, ...]:
        tiles = self.tiles
        return tiles.num_planes, tiles.num_columns, self.group_size, tiles.offset_TGR.dtype


def fits_native_binary(weight: BinaryWeight) -> bool:
    """True if the loops can multiply with the planes: few enough, and no block of 32 columns has two groups."""
    return weight.bits <= MOST_PLANES and fits_words(weight.in_features, weight.group_size)


def pack_native_binary(weight: BinaryWeight) -> NativeBinary:
    """Return the weight in tiles of rows, for the compiled loops.

    Raises:
        FormatError: too many planes, or the border of two groups inside a block (not `fits_native_binary`).
    """
    if not fits_native_binary(weight):
        raise FormatError(
            "sign planes in memory",
            expected=f"up to {MOST_PLANES} planes, groups of a multiple of {BLOCK_COLUMNS} columns or of a whole row",
            found=f"{weight.bits} planes and groups of {weight.group_size} columns in rows of {weight.in_features}",
            action="Multiply with the weight's dequantize(), as load_model does for such groups.",
        )
    alpha_OGP, offset_OG = weight.coefficients.values()
    narrow = all(torch.equal(values.to(torch.float16).to(torch.float32), values) for values in (alpha_OGP, offset_OG))
    dtype = torch.float16 if narrow else torch.float32
    missing = filled_rows(weight.out_features) - weight.out_features
    alpha_OGP = torch.nn.functional.pad(alpha_OGP.to(dtype), (0, 0, 0, 0, 0, missing))
    offset_OG = torch.nn.functional.pad(offset_OG.to(dtype), (0, 0, 0, missing))
    order_I = weight.column_order_I
    tiles = BinaryTiles(
        codes_TBPX=pack_row_tiles(_filled_columns(weight), weight.bits),
        alpha_TGPR=alpha_OGP.view(-1, TILE_ROWS, *alpha_OGP.shape[1:]).permute(0, 2, 3, 1).contiguous(),
        offset_TGR=offset_OG.view(-1, TILE_ROWS, offset_OG.shape[1]).transpose(1, 2).contiguous(),
        num_rows=weight.out_features,
        num_columns=weight.in_features,
    )
    order_I = None if order_I is None else order_I.long().contiguous()
    return NativeBinary(tiles=tiles, group_size=weight.group_size, column_order_I=order_I)


def native_binary_matmul(x: torch.Tensor, weight: NativeBinary, *, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias`; activations are rounded to 8 bits with a scale for each 32 columns.

    A row of `x` has the same bits in any batch and on any number of threads.
    """
    return binary_product(x, weight.tiles, bias_O=bias_O, column_order_I=weight.column_order_I)


def exact_binary_matmul(x: torch.Tensor, weight: NativeBinary, *, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias` with activations as they are, summed in float32.

    Of 16 rows of `x` and more, each has the bits of torch's product, which depend on how many there are.
    """
    if x.numel() < _DENSE_FROM_TOKENS * weight.in_features:
        return binary_product(x, weight.tiles, bias_O=bias_O, column_order_I=weight.column_order_I, exact=True)
    order_I, step = weight.column_order_I, max(_WEIGHTS_PER_CHUNK // (weight.in_features * TILE_ROWS), 1)
    ordered = x if order_I is None else x.index_select(-1, order_I)
    output = x.new_empty((*x.shape[:-1], weight.out_features))
    for begin in range(0, weight.tiles.codes_TBPX.shape[0], step):
        rows = slice(begin * TILE_ROWS, min((begin + step) * TILE_ROWS, weight.out_features))
        dense = weight._dense_rows(begin, begin + step).to(x.dtype)
        output[..., rows] = torch.nn.functional.linear(ordered, dense, None if bias_O is None else bias_O[rows])
    return output


def _filled_columns(weight: BinaryWeight) -> torch.Tensor:
    """Return codes with as many columns as whole groups of whole blocks have."""
    group_size = min(weight.group_size, weight.in_features)
    columns = -(-group_size // BLOCK_COLUMNS) * BLOCK_COLUMNS * weight.num_groups
    missing = columns - weight.in_features
    return torch.nn.functional.pad(weight.codes_OI, (0, missing)) if missing else weight.codes_OI
