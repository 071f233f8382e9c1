"""Packed words: golden values, a literal bit-by-bit reference, and the inverse for every width and size."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optgptq.errors import ExitCode, FormatError, OptGPTQError
from optgptq.packing.words import CHUNK_CODES, pack_rows, unpack_rows, words_per_row


def slow_pack(codes: list[int], bits: int) -> list[int]:
    """One integer as the bit stream, cut into 32-bit words."""
    stream = sum(code << (position * bits) for position, code in enumerate(codes))
    return [(stream >> begin) & 0xFFFFFFFF for begin in range(0, len(codes) * bits, 32)]


def unsigned(words: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.reshape(-1).tolist()]


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("bits", "code", "words"),
    [
        (2, 1, [0x55555555]),
        (2, 2, [0xAAAAAAAA]),
        (3, 3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (3, 4, [0x24924924, 0x49249249, 0x92492492]),
        (4, 7, [0x77777777]),
        (4, 8, [0x88888888]),
        (8, 127, [0x7F7F7F7F]),
        (8, 128, [0x80808080]),
    ],
)
def test_golden_words_of_constant_codes(bits: int, code: int, words: list[int]) -> None:
    count = len(words) * 32 // bits
    assert unsigned(pack_rows(torch.full((count,), code), bits)) == words


def test_golden_words_of_rising_codes() -> None:
    assert unsigned(pack_rows(torch.arange(8), 4)) == [0x76543210]
    assert unsigned(pack_rows(torch.arange(32) % 8, 3)) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert unsigned(pack_rows(torch.tensor([1, 2, 3]), 2)) == [0b111001]


@given(bits=st.integers(1, 8), rows=st.integers(0, 5), count=st.integers(0, 130), seed=st.integers(0, 2**31 - 1))
def test_words_match_the_reference_and_come_back(bits: int, rows: int, count: int, seed: int) -> None:
    codes = random_codes((rows, count), bits, seed)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, words_per_row(count, bits))
    for row, expected in zip(words, codes.tolist(), strict=True):
        assert unsigned(row) == slow_pack(expected, bits)
    assert torch.equal(unpack_rows(words, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(3, CHUNK_CODES // 2 + 32), (CHUNK_CODES // 64 + 5, 63), (2, 3, 100)])
def test_sizes_beyond_one_chunk(bits: int, shape: tuple[int, ...]) -> None:
    codes = random_codes(shape, bits)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, shape[-1]), codes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_any_integer_dtype_and_strides(dtype: torch.dtype) -> None:
    codes = random_codes((40, 33), 4)
    assert torch.equal(pack_rows(codes.to(dtype).t(), 4), pack_rows(codes.t().contiguous(), 4))


@pytest.mark.parametrize("bad", [-1, 8])
def test_codes_out_of_range_are_refused(bad: int) -> None:
    with pytest.raises(OptGPTQError, match="codes from 0 to 7") as caught:
        pack_rows(torch.tensor([0, bad]), 3)
    assert caught.value.exit_code == ExitCode.BUG


def test_contradicting_sizes_and_widths_are_refused() -> None:
    words = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(FormatError, match="rows of 4 words for 32 codes of 4 bits"):
        unpack_rows(words, 4, 32)
    with pytest.raises(FormatError, match=r"torch.int64 rows of 3 words"):
        unpack_rows(words.long(), 3, 32)
    for bits in (0, 9):
        with pytest.raises(FormatError, match="1 to 8 bits per code"):
            pack_rows(words, bits)


@pytest.mark.slow
def test_one_hundred_million_codes_in_two_seconds() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        codes = random_codes((25_000, 4_000), 4)
        begin = time.perf_counter()
        back = unpack_rows(pack_rows(codes, 4), 4, 4_000)
        seconds = time.perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(back, codes)
    assert seconds < 2.0
