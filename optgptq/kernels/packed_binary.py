"""Binary codes as kernels hold them: one bit for each plane and weight, made once when a model is loaded.

A 32-bit word of a plane stands for 32 columns that follow each other; a set bit is a sign of +1. Bit `s + 16 * h` of a
word is column `2 * s + h` of its 32: one shift then brings two neighbouring columns to the sign bits of a pair of
16-bit floats. Files keep another order of bits (`optgptq/packing/planes.py`).

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `P` planes, `W` words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.errors import FormatError

# That of `optgptq.packing.planes`, which makes the words; kernels and packing do not import each other.
COLUMNS_PER_WORD = 32
# Kernels take up to four words of a group, 128 columns, in one step.
WORDS_PER_STEP = 4


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedBinary:
    """A weight in binary coding, for kernels. Built by `optgptq.runtime.linear.pack_binary`.

    Attributes:
        planes_WPO: int32, contiguous. A group takes `group_words` words, the last one too: columns that are not there
            have any bits, and kernels give them inputs of zero.
        alpha_GPO: coefficients, float32, or float16 where that holds every value of both tensors.
        offset_GO: in the same dtype.
        in_features: columns `I`.
        group_size: columns in a group: a multiple of 32, or at least `I` where one group spans the row.
        column_order_I: int64, the input column that each column of the planes takes; None: they are in order.
    """

    planes_WPO: torch.Tensor
    alpha_GPO: torch.Tensor
    offset_GO: torch.Tensor
    in_features: int
    group_size: int
    column_order_I: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows `O`."""
        return self.planes_WPO.shape[2]

    @property
    def bits(self) -> int:
        """Planes `P`."""
        return self.planes_WPO.shape[1]

    @property
    def num_groups(self) -> int:
        """Groups `G` of a row."""
        return self.offset_GO.shape[0]

    @property
    def group_words(self) -> int:
        """Words of a group in one plane."""
        return self.planes_WPO.shape[0] // self.num_groups

    @property
    def step_words(self) -> int:
        """Words that a kernel takes in one step, all of one group: 1, 2 or 4."""
        return math.gcd(self.group_words, WORDS_PER_STEP)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight."""
        return self.planes_WPO.nbytes + self.alpha_GPO.nbytes + self.offset_GO.nbytes

    def to(self, device: torch.device | str) -> PackedBinary:
        """Return the weight on another device."""
        order_I = self.column_order_I
        return replace(
            self,
            planes_WPO=self.planes_WPO.to(device),
            alpha_GPO=self.alpha_GPO.to(device),
            offset_GO=self.offset_GO.to(device),
            column_order_I=None if order_I is None else order_I.to(device),
        )

    def stacks_with(self, other: PackedBinary) -> bool:
        """True if `stacked` may join the two: they differ in their rows only."""
        mine_I, its_I = self.column_order_I, other.column_order_I
        same_order = mine_I is its_I or (mine_I is not None and its_I is not None and torch.equal(mine_I, its_I))
        return same_order and (self.bits, self.group_size, self.in_features, self.alpha_GPO.dtype) == (
            other.bits,
            other.group_size,
            other.in_features,
            other.alpha_GPO.dtype,
        )

    @classmethod
    def stacked(cls, parts: Sequence[PackedBinary]) -> PackedBinary:
        """Return weights that differ in their rows only as one, row below row."""
        return replace(
            parts[0],
            planes_WPO=torch.cat([part.planes_WPO for part in parts], dim=2),
            alpha_GPO=torch.cat([part.alpha_GPO for part in parts], dim=2),
            offset_GO=torch.cat([part.offset_GO for part in parts], dim=1),
        )

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """Return inputs `[..., I]` in the order of the planes' columns; the same tensor where that is their order."""
        return x if self.column_order_I is None else x.index_select(-1, self.column_order_I)


def fits_words(in_features: int, group_size: int) -> bool:
    """True if no word has columns of two groups, so that kernels can multiply with the planes."""
    return group_size >= in_features or group_size % COLUMNS_PER_WORD == 0


def words_per_group(in_features: int, group_size: int) -> int:
    """Return how many words a group takes in one plane.

    Raises:
        FormatError: not `fits_words`.
    """
    if not fits_words(in_features, group_size):
        raise FormatError(
            "sign planes in memory",
            expected=f"groups of a multiple of {COLUMNS_PER_WORD} columns, or one group for a row",
            found=f"groups of {group_size} columns in rows of {in_features}",
            action="Multiply with the weight's dequantize(), as load_model does for such groups.",
        )
    if group_size >= in_features:
        words = -(-in_features // COLUMNS_PER_WORD)
        return -(-words // WORDS_PER_STEP) * WORDS_PER_STEP
    return group_size // COLUMNS_PER_WORD


def arrange_codes(codes_OI: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return codes `[O, 32 W]` whose planes, packed 32 columns to a word from the lowest bit up, are `planes_WPO`."""
    rows, columns = codes_OI.shape
    words = words_per_group(columns, group_size) * -(-columns // group_size)
    padded_OI = torch.nn.functional.pad(codes_OI, (0, words * COLUMNS_PER_WORD - columns))
    return padded_OI.view(rows, words, COLUMNS_PER_WORD // 2, 2).transpose(2, 3).reshape(rows, -1)


def arrange_inputs(x: torch.Tensor, num_words: int) -> torch.Tensor:
    """Return ordered inputs `[..., I]` as `[..., 32 W]`: column `32 w + t` belongs to bit `t` of word `w`."""
    padded = torch.nn.functional.pad(x, (0, num_words * COLUMNS_PER_WORD - x.shape[-1]))
    pairs = padded.view(*x.shape[:-1], num_words, COLUMNS_PER_WORD // 2, 2)
    return pairs.transpose(-1, -2).reshape(*x.shape[:-1], num_words * COLUMNS_PER_WORD)
