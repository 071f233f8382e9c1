"""Zero points of GPTQ files: version 1 stores the zero point minus one, version 2 the zero point, packed along `O`.

Files with the wrong label exist. A symmetric file gives itself away: all its zero points are `2**(bits - 1)`, so the
stored value tells the version whatever the label says. An asymmetric file does not, and is read as labelled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.packing.words import pack_rows, unpack_rows


@dataclass(frozen=True, slots=True, eq=False)
class ZeroPoints:
    """Zero points as read: int32 `[G, O]`, and what was odd about them."""

    zero_point_GO: torch.Tensor
    notes: tuple[str, ...]


def store_zero_points(zero_point_GO: torch.Tensor, bits: int, *, version: int) -> torch.Tensor:
    """Return `qzeros`, int32 `[G, words]`; the caller has checked that every value minus one fits in version 1."""
    return pack_rows(zero_point_GO - (1 if version == 1 else 0), bits)


def load_zero_points(words: torch.Tensor, bits: int, count: int, *, version: int, symmetric: bool) -> ZeroPoints:
    """Return the zero points behind `qzeros` `[G, words]`.

    Args:
        words: as stored.
        bits: 2, 3, 4 or 8.
        count: output rows `O`.
        version: what the label says, 1 or 2.
        symmetric: what the configuration says.
    """
    stored_GO = unpack_rows(words, bits, count).to(torch.int32)
    middle = 2 ** (bits - 1)
    # The stored value of a symmetric file of the other version.
    telltale = middle if version == 1 else middle - 1
    if symmetric and bool((stored_GO == telltale).all()):
        note = (
            f"labelled version {version}, but its zero points are those of version {3 - version}; read as the words say"
        )
        return ZeroPoints(torch.full_like(stored_GO, middle), (note,))
    if version == 2:
        return ZeroPoints(stored_GO, ())
    wrapped = int((stored_GO == 2**bits - 1).sum())
    if not wrapped:
        return ZeroPoints(stored_GO + 1, ())
    note = f"{wrapped} zero points wrapped below zero when version 1 was written; read as GPTQModel reads them"
    return ZeroPoints(_add_one_in_words(words, stored_GO, bits, count), (note,))


def _add_one_in_words(words: torch.Tensor, stored_GO: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Undo the subtraction of GPTQModel, which takes one from every value of a word at once and lets borrows run.

    Its 3-bit values, which cross words, are shifted one by one instead.
    """
    if bits == 3:
        return (stored_GO + 1) % 8
    ones = sum(1 << begin for begin in range(0, 32, bits))
    return unpack_rows(words + ones, bits, count).to(torch.int32)
