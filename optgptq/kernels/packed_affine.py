"""Codes of uniform grids as kernels hold them: words of 32 bits, made once when a model is loaded.

A block is 32 columns that follow each other, 16 pairs. It takes as many words as a code has bits; word `t` of `W` has
the pairs `t, t + W, t + 2 W, ...` from its lowest bits up, the first column of a pair in its low half and the second in
its high half. One shift then brings two neighbouring columns to the last places of a pair of 16-bit floats, and four
neighbouring threads of a matrix unit, which take neighbouring pairs, read different words. Codes of 3 bits are two
planes: words of 2 bits, and one word of the bits above them for each block. Files keep another order of bits
(`optgptq/packing/words.py`).

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `B` blocks of 32 columns, `W` 32-bit words of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.errors import FormatError

COLUMNS_PER_BLOCK = 32
PAIRS_PER_BLOCK = 16
# Kernels take up to four blocks of a group, 128 columns, in one step.
BLOCKS_PER_STEP = 4
# Rows are filled up to a multiple of what a program takes, so that no load of a kernel needs a mask.
ROWS_PER_BLOCK = 64
# Codes of other widths take the words of the next of these.
WIDTHS = (2, 3, 4, 8)
# The word of the third bits is turned so that the kernels, which turn it back by one place more than the number of the
# pair, find every bit at place 2 of its half.
_HIGH_TURN = 3


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedAffine:
    """A weight on uniform grids, for kernels. Built by `pack_affine`.

    All rows are filled up to a multiple of `ROWS_PER_BLOCK` with codes and scales of zero. A group takes whole blocks,
    the last one too: columns that are not there have codes of zero, and kernels give them inputs of zero.

    Attributes:
        low_BOW: int32 `[B, O, W]`, contiguous, `W` words for each block and row.
        high_BO: int32 `[B, O]`, the third bits where codes have 3; None otherwise.
        scale_GO: in the dtype of the checkpoint.
        zero_point_GO: uint8, int16 where codes have 8 bits; None: all are `zero_point`.
        zero_point: see there.
        bits: 2, 3, 4 or 8.
        out_features: rows `O` without the filling.
        in_features: columns `I`.
        group_size: columns in a group: a multiple of 32, or at least `I` where one group spans the row.
        column_order_I: int64, the input column that each column of the words takes; None: they are in order.
    """

    low_BOW: torch.Tensor
    high_BO: torch.Tensor | None
    scale_GO: torch.Tensor
    zero_point_GO: torch.Tensor | None
    zero_point: int
    bits: int
    out_features: int
    in_features: int
    group_size: int
    column_order_I: torch.Tensor | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks `B` of a row."""
        return self.low_BOW.shape[0]

    @property
    def num_groups(self) -> int:
        """Groups `G` of a row."""
        return self.scale_GO.shape[0]

    @property
    def group_blocks(self) -> int:
        """Blocks of a group."""
        return self.num_blocks // self.num_groups

    @property
    def row_blocks(self) -> int:
        """Rows with their filling, counted in blocks of `ROWS_PER_BLOCK`."""
        return self.low_BOW.shape[1] // ROWS_PER_BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight."""
        parts = (self.low_BOW, self.high_BO, self.scale_GO, self.zero_point_GO)
        return sum(part.nbytes for part in parts if part is not None)

    def step_blocks(self, most: int) -> int:
        """Return how many blocks a kernel takes in one step, all of one group: a power of two up to `most`."""
        return math.gcd(self.group_blocks, most)

    def to(self, device: torch.device | str) -> PackedAffine:
        """Return the weight on another device."""
        return replace(
            self,
            low_BOW=self.low_BOW.to(device),
            high_BO=_moved(self.high_BO, device),
            scale_GO=self.scale_GO.to(device),
            zero_point_GO=_moved(self.zero_point_GO, device),
            column_order_I=_moved(self.column_order_I, device),
        )

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """Return inputs `[..., I]` in the order of the words' columns; the same tensor where that is their order."""
        return x if self.column_order_I is None else x.index_select(-1, self.column_order_I)

    def stacks_with(self, other: PackedAffine) -> bool:
        """True if the rows of both can be rows of one weight: `stacked`."""
        mine, theirs = self.column_order_I, other.column_order_I
        same_order = mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs))
        return same_order and self._shape() == other._shape()

    @classmethod
    def stacked(cls, parts: Sequence[PackedAffine]) -> PackedAffine:
        """Return weights of which each `stacks_with` the first as one, row below row."""
        return replace(
            parts[0],
            low_BOW=_stacked_rows([(part.low_BOW, part.out_features) for part in parts]),
            high_BO=_stacked_if_there([(part.high_BO, part.out_features) for part in parts]),
            scale_GO=_stacked_rows([(part.scale_GO, part.out_features) for part in parts]),
            zero_point_GO=_stacked_if_there([(part.zero_point_GO, part.out_features) for part in parts]),
            out_features=sum(part.out_features for part in parts),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight `[O, I]`, columns in the model's order: to the bit what it was packed from gives."""
        rows, columns = self.out_features, self.in_features
        steps_BOL = _unpacked(self.low_BOW, PAIRS_PER_BLOCK // self.low_BOW.shape[2])
        if self.high_BO is not None:
            turned_BO = self.high_BO.long() & 0xFFFFFFFF
            natural_BO = (turned_BO >> _HIGH_TURN) | (turned_BO << (32 - _HIGH_TURN))
            steps_BOL += _unpacked(natural_BO[:, :, None], PAIRS_PER_BLOCK) << 2
        group_B = torch.arange(self.num_blocks, device=self.scale_GO.device) // self.group_blocks
        zero_point = self.zero_point if self.zero_point_GO is None else self.zero_point_GO[group_B, :, None].long()
        dense_BOL = (steps_BOL - zero_point).to(torch.float32).mul_(self.scale_GO[group_B, :, None].to(torch.float32))
        dense_OI = dense_BOL.permute(1, 0, 2).reshape(dense_BOL.shape[1], -1)[:rows, :columns].to(dtype)
        if self.column_order_I is None:
            return dense_OI
        return torch.empty_like(dense_OI).index_copy_(1, self.column_order_I, dense_OI)

    def _shape(self) -> tuple[object, ...]:
        zero_points = self.zero_point if self.zero_point_GO is None else None
        sizes = (self.bits, self.in_features, self.group_size, self.num_blocks)
        return (*sizes, self.scale_GO.dtype, self.low_BOW.device, zero_points)


def fits_blocks(weight: AffineWeight) -> bool:
    """True if no block has columns of two groups, so that kernels can multiply with the words."""
    if weight.group_size < weight.in_features and weight.group_size % COLUMNS_PER_BLOCK:
        return False
    if weight.group_index_I is None:
        return True
    columns = torch.arange(weight.in_features, device=weight.group_index_I.device)
    return torch.equal(weight.group_index_I.sort().values.long(), columns // weight.group_size)


def pack_affine(weight: AffineWeight) -> PackedAffine:
    """Return the weight in words, on its device, for kernels.

    Raises:
        FormatError: the border of two groups is inside a block of 32 columns (not `fits_blocks`), or codes are wider
            than 8 bits.
    """
    _require_fits(weight)
    bits = next(width for width in WIDTHS if width >= weight.bits)
    order_I = None
    if weight.group_index_I is not None:
        order_I = weight.group_index_I.long().argsort(stable=True)
        if torch.equal(order_I, torch.arange(weight.in_features, device=order_I.device)):
            order_I = None
    codes_OI = weight.codes_OI if order_I is None else weight.codes_OI[:, order_I]
    codes_BOL = _blocks(codes_OI, weight.num_groups, min(weight.group_size, weight.in_features))
    first = weight.zero_point_OG.flatten()[:1]
    is_common = bool((weight.zero_point_OG == first).all())
    zero_point_dtype = torch.int16 if bits == 8 else torch.uint8
    return PackedAffine(
        low_BOW=_words(codes_BOL & 3 if bits == 3 else codes_BOL, 2 if bits == 3 else bits),
        high_BO=_turned_words(codes_BOL >> 2) if bits == 3 else None,
        scale_GO=_filled_rows(weight.scale_OG.t()),
        zero_point_GO=None if is_common else _filled_rows(weight.zero_point_OG.t().to(zero_point_dtype)),
        zero_point=int(first) if is_common else 0,
        bits=bits,
        out_features=weight.out_features,
        in_features=weight.in_features,
        group_size=weight.group_size,
        column_order_I=order_I,
    )


def _require_fits(weight: AffineWeight) -> None:
    if weight.bits <= max(WIDTHS) and fits_blocks(weight):
        return
    raise FormatError(
        "codes in memory",
        expected=f"up to {max(WIDTHS)} bits, and groups of a multiple of {COLUMNS_PER_BLOCK} columns or of a whole row",
        found=f"{weight.bits} bits and groups of {weight.group_size} columns in rows of {weight.in_features}",
        action="Multiply with the weight's dequantize(), as load_model does for such groups.",
    )


def _blocks(codes_OI: torch.Tensor, num_groups: int, group_size: int) -> torch.Tensor:
    """Return codes `[B, O, 32]`, rows and groups filled up."""
    multiple = COLUMNS_PER_BLOCK * (BLOCKS_PER_STEP if num_groups == 1 else 1)
    columns = -(-group_size // multiple) * multiple * num_groups
    rows = -(-codes_OI.shape[0] // ROWS_PER_BLOCK) * ROWS_PER_BLOCK
    missing = (0, columns - codes_OI.shape[1], 0, rows - codes_OI.shape[0])
    padded_OI = torch.nn.functional.pad(codes_OI, missing)
    return padded_OI.view(rows, -1, COLUMNS_PER_BLOCK).transpose(0, 1)


def _words(codes_BOL: torch.Tensor, width: int) -> torch.Tensor:
    """Return codes of `width` bits as words, int32 `[B, O, width]`."""
    places = PAIRS_PER_BLOCK // width
    pairs = codes_BOL.reshape(*codes_BOL.shape[:2], places, width, 2)
    words_BOW = torch.zeros(*codes_BOL.shape[:2], width, dtype=torch.int32, device=codes_BOL.device)
    for place in range(places):
        for half in range(2):
            words_BOW |= pairs[:, :, place, :, half].to(torch.int32) << (place * width + 16 * half)
    return words_BOW


def _turned_words(bits_BOL: torch.Tensor) -> torch.Tensor:
    """Return single bits as words, int32 `[B, O]`, turned as the kernels want them."""
    natural_BO = _words(bits_BOL, 1)[:, :, 0].long() & 0xFFFFFFFF
    turned_BO = (natural_BO << _HIGH_TURN | natural_BO >> (32 - _HIGH_TURN)) & 0xFFFFFFFF
    return torch.where(turned_BO >= 1 << 31, turned_BO - (1 << 32), turned_BO).to(torch.int32)


def _unpacked(words_BOW: torch.Tensor, places: int) -> torch.Tensor:
    """Return the codes of words, int64 `[B, O, 32]`."""
    width = PAIRS_PER_BLOCK // places
    shifts = torch.arange(places, device=words_BOW.device)[:, None, None] * width
    halves = torch.arange(2, device=words_BOW.device) * 16
    fields = words_BOW.long()[:, :, None, :, None] >> (shifts + halves)
    return (fields & ((1 << width) - 1)).flatten(2)


def _filled_rows(values_GO: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values_GO, (0, -values_GO.shape[1] % ROWS_PER_BLOCK)).contiguous()


def _stacked_rows(parts: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Return tensors `[n, O, ...]` without their filling as one that is filled."""
    joined = torch.cat([tensor[:, :rows] for tensor, rows in parts], 1)
    filling = joined.new_zeros(joined.shape[0], -joined.shape[1] % ROWS_PER_BLOCK, *joined.shape[2:])
    return torch.cat([joined, filling], 1)


def _stacked_if_there(parts: list[tuple[torch.Tensor | None, int]]) -> torch.Tensor | None:
    there = [(tensor, rows) for tensor, rows in parts if tensor is not None]
    return _stacked_rows(there) if there else None


def _moved(tensor: torch.Tensor | None, device: torch.device | str) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
