"""Products with uniform grids by compiled loops on a processor: tiles of rows, made once when a model is loaded.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`; `T` tiles of 16 rows, `R` the rows of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.errors import FormatError
from optgptq.kernels.packed_affine import fits_blocks
from optgptq.native.products import AffineTiles, affine_product, product_paths
from optgptq.native.row_tiles import (
    BLOCK_COLUMNS,
    TILE_ROWS,
    filled_rows,
    pack_row_tiles,
    stack_row_tiles,
    unpack_row_tiles,
)

# Codes of other widths take the tiles of the next of these.
_WIDTHS = (2, 3, 4, 8)
# From so many tokens on, exact products are those of torch with rows that are decoded once for all tokens.
_DENSE_FROM_TOKENS = 16
_WEIGHTS_PER_CHUNK = 1 << 20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class NativeAffine:
    """A weight on uniform grids, for the compiled loops. Built by `pack_native_affine`.

    Attributes:
        tiles: codes, scales and zero points.
        group_size: columns in a group: a multiple of 32, or at least `I` where one group spans the row.
        column_order_I: int64, the input column that each column of the tiles takes; None: they are in order.
    """

    tiles: AffineTiles
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
        parts = (self.tiles.codes_TBCX, self.tiles.scale_TGR, self.tiles.zero_point_TGR)
        return sum(part.nbytes for part in parts if part is not None)

    def stacks_with(self, other: NativeAffine) -> bool:
        """True if `stacked` may join the two: whole tiles, and nothing but the rows differs."""
        mine_I, its_I = self.column_order_I, other.column_order_I
        same_order = mine_I is its_I or (mine_I is not None and its_I is not None and torch.equal(mine_I, its_I))
        whole = self.out_features % TILE_ROWS == 0 and other.out_features % TILE_ROWS == 0
        return same_order and whole and self._shape() == other._shape()

    @classmethod
    def stacked(cls, parts: Sequence[NativeAffine]) -> NativeAffine:
        """Return weights of which each `stacks_with` the first as one, row below row."""
        tiles = [part.tiles for part in parts]
        zero_points = [tile.zero_point_TGR for tile in tiles if tile.zero_point_TGR is not None]
        joined = replace(
            tiles[0],
            codes_TBCX=stack_row_tiles([tile.codes_TBCX for tile in tiles]),
            scale_TGR=torch.cat([tile.scale_TGR for tile in tiles]),
            zero_point_TGR=torch.cat(zero_points) if zero_points else None,
            num_rows=sum(tile.num_rows for tile in tiles),
        )
        return replace(parts[0], tiles=joined)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight `[O, I]`, columns in the model's order: to the bit what it was packed from gives."""
        dense_OI = self._dense_rows(0, self.tiles.codes_TBCX.shape[0]).to(dtype)
        if self.column_order_I is None:
            return dense_OI
        return torch.empty_like(dense_OI).index_copy_(1, self.column_order_I, dense_OI)

    def _dense_rows(self, begin: int, end: int) -> torch.Tensor:
        """Return the rows of tiles `begin` to before `end` in float32, columns in the order of the tiles."""
        tiles = self.tiles
        codes_OI = unpack_row_tiles(tiles.codes_TBCX[begin:end], tiles.bits)
        steps_OGL = codes_OI.view(codes_OI.shape[0], tiles.num_groups, -1).to(torch.int32)
        if tiles.zero_point_TGR is None:
            steps_OGL -= tiles.zero_point
        else:
            steps_OGL -= _by_row(tiles.zero_point_TGR[begin:end]).to(torch.int32)[:, :, None]
        scale_OG = _by_row(tiles.scale_TGR[begin:end]).to(torch.float32)
        dense_OI = steps_OGL.to(torch.float32).mul_(scale_OG[:, :, None]).flatten(1)
        return dense_OI[: tiles.num_rows - begin * TILE_ROWS, : tiles.num_columns]

    def _shape(self) -> tuple[object, ...]:
        tiles = self.tiles
        zero_points = tiles.zero_point if tiles.zero_point_TGR is None else tiles.zero_point_TGR.dtype
        return tiles.bits, tiles.num_columns, self.group_size, tiles.scale_TGR.dtype, zero_points


def takes_native(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether the compiled products are there for activations of this dtype on this device."""
    return device.type == "cpu" and dtype in _DTYPES and bool(product_paths())


def fits_native(weight: AffineWeight) -> bool:
    """True if no block of 32 columns has columns of two groups, so that the loops can multiply with the codes."""
    return weight.bits <= max(_WIDTHS) and fits_blocks(weight)


def pack_native_affine(weight: AffineWeight) -> NativeAffine:
    """Return the weight in tiles of rows, for the compiled loops.

    Raises:
        FormatError: the border of two groups is inside a block of 32 columns (not `fits_native`).
    """
    if not fits_native(weight):
        raise FormatError(
            "codes in memory",
            expected=f"groups of a multiple of {BLOCK_COLUMNS} columns, or of a whole row",
            found=f"{weight.bits} bits and groups of {weight.group_size} columns in rows of {weight.in_features}",
            action="Multiply with the weight's dequantize(), as load_model does for such groups.",
        )
    bits = next(width for width in _WIDTHS if width >= weight.bits)
    order_I = _column_order(weight)
    codes_OI = weight.codes_OI if order_I is None else weight.codes_OI[:, order_I]
    first = weight.zero_point_OG.flatten()[:1]
    is_common = bool((weight.zero_point_OG == first).all())
    zero_dtype = torch.int16 if bits == 8 else torch.uint8
    tiles = AffineTiles(
        codes_TBCX=pack_row_tiles(_filled_columns(codes_OI, weight), bits),
        scale_TGR=_by_tile(_narrowed(weight.scale_OG)),
        zero_point_TGR=None if is_common else _by_tile(weight.zero_point_OG.to(zero_dtype)),
        zero_point=int(first) if is_common else 0,
        bits=bits,
        num_rows=weight.out_features,
        num_columns=weight.in_features,
    )
    return NativeAffine(tiles=tiles, group_size=weight.group_size, column_order_I=order_I)


def native_affine_matmul(x: torch.Tensor, weight: NativeAffine, *, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias`; activations are rounded to 8 bits with a scale for each 32 columns.

    A row of `x` has the same bits in any batch and on any number of threads.
    """
    return affine_product(x, weight.tiles, bias_O=bias_O, column_order_I=weight.column_order_I)


def exact_affine_matmul(x: torch.Tensor, weight: NativeAffine, *, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias` with activations as they are, summed in float32.

    Of 16 rows of `x` and more, each has the bits of torch's product, which depend on how many there are.
    """
    if x.numel() < _DENSE_FROM_TOKENS * weight.in_features:
        return affine_product(x, weight.tiles, bias_O=bias_O, column_order_I=weight.column_order_I, exact=True)
    order_I, step = weight.column_order_I, max(_WEIGHTS_PER_CHUNK // (weight.in_features * TILE_ROWS), 1)
    ordered = x if order_I is None else x.index_select(-1, order_I)
    output = x.new_empty((*x.shape[:-1], weight.out_features))
    for begin in range(0, weight.tiles.codes_TBCX.shape[0], step):
        rows = slice(begin * TILE_ROWS, min((begin + step) * TILE_ROWS, weight.out_features))
        dense = weight._dense_rows(begin, begin + step).to(x.dtype)
        output[..., rows] = torch.nn.functional.linear(ordered, dense, None if bias_O is None else bias_O[rows])
    return output


def _column_order(weight: AffineWeight) -> torch.Tensor | None:
    """Return which columns make up the groups, one after the other; None where they are in order."""
    if weight.group_index_I is None:
        return None
    order_I = weight.group_index_I.long().argsort(stable=True)
    return None if torch.equal(order_I, torch.arange(weight.in_features)) else order_I


def _filled_columns(codes_OI: torch.Tensor, weight: AffineWeight) -> torch.Tensor:
    """Return codes with as many columns as whole groups of whole blocks have."""
    group_size = min(weight.group_size, weight.in_features)
    columns = -(-group_size // BLOCK_COLUMNS) * BLOCK_COLUMNS * weight.num_groups
    missing = columns - codes_OI.shape[1]
    return torch.nn.functional.pad(codes_OI, (0, missing)) if missing else codes_OI


def _narrowed(scale_OG: torch.Tensor) -> torch.Tensor:
    """Return scales in float16 where that holds all of them, else in float32."""
    half_OG = scale_OG.to(torch.float16)
    return half_OG if torch.equal(half_OG.to(torch.float32), scale_OG.to(torch.float32)) else scale_OG.to(torch.float32)


def _by_tile(values_OG: torch.Tensor) -> torch.Tensor:
    """Return coefficients as `[T, G, R]`, rows filled up with zeros."""
    rows, groups = values_OG.shape
    filled_OG = torch.nn.functional.pad(values_OG, (0, 0, 0, filled_rows(rows) - rows))
    return filled_OG.view(-1, TILE_ROWS, groups).transpose(1, 2).contiguous()


def _by_row(values_TGR: torch.Tensor) -> torch.Tensor:
    return values_TGR.transpose(1, 2).flatten(0, 1)
