"""Codes of 1 to 8 bits as sign planes, and back.

Bit `t` of word `j` of plane `p` is bit `p` of the code of column `32 * j + t`. What is left of the last word of a row
is zero. Source: the layout that LUT-GEMM, AnyBCQ and BPDQ share, int32 `[columns / 32, planes, rows]`.

Eight codes are handled at a time as the bytes of one 64-bit integer: one multiplication gathers the lowest bits of the
eight bytes in the top byte, and another one spreads a byte over eight.

Shapes: `O` output rows, `I` input columns, `W` 32-bit words, `P` planes.
"""

from __future__ import annotations

import torch

from optgptq.errors import FormatError, OptGPTQError

COLUMNS_PER_WORD = 32
# Codes in flight: the working set stays in the processor's cache and does not grow with the weight.
CHUNK_CODES = 1 << 19

_LOWEST_BITS = 0x0101010101010101
# Bits 7, 14, ... 56: moves bit 8 * i of a number to bit 56 + i, without carries.
_GATHER = 0x0102040810204080
# Bit i of byte i, as a signed number.
_DIAGONAL = 0x8040201008040201 - (1 << 64)
_ALL_BUT_TOP_BITS = 0x7F7F7F7F7F7F7F7F


def words_per_plane(count: int) -> int:
    """Return how many words a row of `count` columns takes in each plane."""
    return -(-count // COLUMNS_PER_WORD)


def pack_planes(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the planes, int32 `[ceil(I / 32), bits, O]`, of integer codes `[O, I]` in `0 .. 2**bits - 1`."""
    _require_width(bits)
    if codes_OI.numel() and not 0 <= int(codes_OI.min()) <= int(codes_OI.max()) < 2**bits:
        raise OptGPTQError(
            "packing",
            expected=f"codes from 0 to {2**bits - 1}",
            found=f"{int(codes_OI.min())} to {int(codes_OI.max())}",
            action="Please report this: it is a bug in optgptq.",
        )
    rows, count = codes_OI.shape
    words = words_per_plane(count)
    planes_WPO = torch.empty(words, bits, rows, dtype=torch.int32, device=codes_OI.device)
    step = _rows_per_chunk(words)
    for begin in range(0, rows if words else 0, step):
        chunk_OI = codes_OI[begin : begin + step].to(torch.uint8)
        padded_OI = torch.nn.functional.pad(chunk_OI, (0, words * COLUMNS_PER_WORD - count))
        lanes = padded_OI.contiguous().view(torch.int64).reshape(-1)
        for plane in range(bits):
            gathered = ((lanes >> plane) & _LOWEST_BITS).mul_(_GATHER)
            stream = gathered.view(torch.uint8).view(-1, 8)[:, 7].clone()
            planes_WPO[:, plane, begin : begin + step] = stream.view(torch.int32).view(-1, words).t()
    return planes_WPO


def unpack_planes(planes_WPO: torch.Tensor, count: int) -> torch.Tensor:
    """Return the codes of the first `count` columns, uint8 `[O, count]`; bits beyond them are ignored.

    Raises:
        FormatError: the planes do not have the words that `count` columns take.
    """
    shape = list(planes_WPO.shape)
    if planes_WPO.dtype != torch.int32 or len(shape) != 3 or shape[0] != words_per_plane(count):
        raise FormatError(
            "sign planes",
            expected=f"int32 [{words_per_plane(count)}, planes, rows] for {count} columns",
            found=f"{planes_WPO.dtype} {shape}",
            action="Check the shapes of the checkpoint: they contradict each other.",
        )
    words, bits, rows = shape
    _require_width(bits)
    codes_OI = torch.empty(rows, count, dtype=torch.uint8, device=planes_WPO.device)
    step = _rows_per_chunk(words)
    for begin in range(0, rows if words else 0, step):
        chunk_WPO = planes_WPO[:, :, begin : begin + step]
        lanes = torch.zeros(chunk_WPO.shape[2] * words * 4, dtype=torch.int64, device=planes_WPO.device)
        for plane in range(bits):
            words_OW = chunk_WPO[:, plane].t().clone(memory_format=torch.contiguous_format)
            stream = words_OW.view(-1).view(torch.uint8)
            # Byte i of a lane: bit i of the stream's byte alone, moved to the top bit, then to the bit of the plane.
            spread = stream.to(torch.int64).mul_(_LOWEST_BITS).bitwise_and_(_DIAGONAL).add_(_ALL_BUT_TOP_BITS)
            lanes |= (spread >> 7).bitwise_and_(_LOWEST_BITS) << plane
        codes_OI[begin : begin + step] = lanes.view(torch.uint8).view(-1, words * COLUMNS_PER_WORD)[:, :count]
    return codes_OI


def num_set_padding_bits(planes_WPO: torch.Tensor, count: int) -> int:
    """Return how many rows and planes have a bit set beyond column `count`; files must have none."""
    used = count % COLUMNS_PER_WORD
    if not used:
        return 0
    return int((planes_WPO[-1] >> used != 0).sum())


def _rows_per_chunk(words: int) -> int:
    return max(1, CHUNK_CODES // max(1, words * COLUMNS_PER_WORD))


def _require_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise FormatError(
            "sign planes",
            expected="1 to 8 planes",
            found=f"{bits}",
            action="Use a checkpoint or recipe of another width.",
        )
