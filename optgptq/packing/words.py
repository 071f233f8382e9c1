"""Codes of 1 to 8 bits, packed into 32-bit words, and back.

Code `i` of a row takes bits `[i * bits, (i + 1) * bits)` of a little-endian bit stream that is cut into 32-bit words;
a row ends with the word that its last bit is in, and what is left of that word is zero. This one rule gives the words
of GPTQ and of compressed-tensors alike.

Eight codes are handled at a time as the bytes of one 64-bit integer. Three masked shifts close the gaps between them,
in pairs, then fours, then all eight, or open them in the opposite order: a few passes of integer arithmetic for any
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from optgptq.errors import FormatError, OptGPTQError

# 32 codes fill exactly `bits` words, whatever the width.
CODES_PER_BLOCK = 32
# Codes in flight: the working set stays in the processor's cache and does not grow with the weight.
CHUNK_CODES = 1 << 19


def words_per_row(count: int, bits: int) -> int:
    """Return how many words `count` codes take."""
    return -(-count * bits // 32)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the words, int32 `[..., ceil(n * bits / 32)]`, of integer codes `[..., n]` in `0 .. 2**bits - 1`."""
    _require_width(bits)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise OptGPTQError(
            "packing",
            expected=f"codes from 0 to {2**bits - 1}",
            found=f"{int(codes.min())} to {int(codes.max())}",
            action="Please report this: it is a bug in optgptq.",
        )
    count = codes.shape[-1]
    rows = codes.reshape(math.prod(codes.shape[:-1]), count)
    packed = torch.empty(rows.shape[0], words_per_row(count, bits), dtype=torch.int32, device=codes.device)
    _by_chunks(rows, packed, (CODES_PER_BLOCK, bits), lambda chunk: _pack_blocks(chunk.to(torch.uint8), bits))
    return packed.reshape(*codes.shape[:-1], packed.shape[1])


def unpack_rows(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first `count` codes of every row of words, uint8 `[..., count]`.

    Raises:
        FormatError: the rows do not have the words that `count` codes take.
    """
    _require_width(bits)
    if words.dtype != torch.int32 or words.shape[-1] != words_per_row(count, bits):
        raise FormatError(
            "packed codes",
            expected=f"int32 rows of {words_per_row(count, bits)} words for {count} codes of {bits} bits",
            found=f"{words.dtype} rows of {words.shape[-1]} words",
            action="Check bits and shapes of the checkpoint: they contradict each other.",
        )
    rows = words.reshape(math.prod(words.shape[:-1]), words.shape[-1])
    codes = torch.empty(rows.shape[0], count, dtype=torch.uint8, device=words.device)
    _by_chunks(rows, codes, (bits, CODES_PER_BLOCK), lambda chunk: _unpack_blocks(chunk, bits))
    return codes.reshape(*words.shape[:-1], count)


def _by_chunks(
    source: torch.Tensor,
    target: torch.Tensor,
    block: tuple[int, int],
    convert: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Fill `target` from `source`, both `[rows, columns]`, with `convert`, which maps whole blocks to whole blocks.

    `block` is the number of columns of a block in source and target. Rows of whole blocks are one long row.
    """
    if source.numel() == 0:
        return
    if source.shape[1] % block[0] == 0 and target.shape[1] % block[1] == 0:
        flat_source, flat_target = source.reshape(-1), target.view(-1)
        step = CHUNK_CODES // CODES_PER_BLOCK
        for begin in range(0, flat_source.numel() // block[0], step):
            chunk = flat_source[begin * block[0] : (begin + step) * block[0]]
            flat_target[begin * block[1] : (begin + step) * block[1]] = convert(chunk)
        return
    columns = -(-source.shape[1] // block[0]) * block[0]
    step = max(1, CHUNK_CODES // (columns // block[0] * CODES_PER_BLOCK))
    for begin in range(0, source.shape[0], step):
        chunk = torch.nn.functional.pad(source[begin : begin + step], (0, columns - source.shape[1]))
        converted = convert(chunk.reshape(-1)).view(chunk.shape[0], -1)
        target[begin : begin + step] = converted[:, : target.shape[1]]


def _pack_blocks(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Turn uint8 codes `[32 n]` into int32 words `[bits n]`."""
    lanes = codes.contiguous().view(torch.int64)
    for width, used, low in _steps(bits):
        lanes = (lanes & low) | ((lanes >> (width - used)) & (low << used))
    return lanes.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1).contiguous().view(torch.int32)


def _unpack_blocks(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Turn int32 words `[bits n]` into uint8 codes `[32 n]`."""
    stream = words.contiguous().view(torch.uint8).view(-1, bits)
    lanes = torch.nn.functional.pad(stream, (0, 8 - bits)).reshape(-1).view(torch.int64)
    for width, used, low in reversed(_steps(bits)):
        lanes = (lanes & low) | ((lanes << (width - used)) & (low << width))
    return lanes.view(torch.uint8)


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """Return lane width, bits used in it and the mask of the even lanes, for lanes of 1, 2 and 4 bytes.

    A step joins each pair of lanes into one of twice the width and twice the bits. 8 bits leave no gaps to close.
    """
    if bits == 8:
        return []
    widths = (8, 16, 32)
    used = [bits * width // 8 for width in widths]
    return [
        (width, filled, sum(((1 << filled) - 1) << begin for begin in range(0, 64, 2 * width)))
        for width, filled in zip(widths, used, strict=True)
    ]


def _require_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise FormatError(
            "packed codes",
            expected="1 to 8 bits per code",
            found=f"{bits}",
            action="Use a checkpoint or recipe of another width.",
        )
