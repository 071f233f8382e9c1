"""Sign planes: golden words, exact round trips at every width and odd size, padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.errors import FormatError, OptGPTQError
from optgptq.packing import planes
from optgptq.packing.planes import num_set_padding_bits, pack_planes, unpack_planes


def random_codes(rows: int, columns: int, bits: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


def slow_planes(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """The rule, one bit at a time."""
    rows, columns = codes_OI.shape
    words = [[[0] * rows for _ in range(bits)] for _ in range(-(-columns // 32))]
    for row in range(rows):
        for column in range(columns):
            for plane in range(bits):
                if int(codes_OI[row, column]) >> plane & 1:
                    words[column // 32][plane][row] |= 1 << column % 32
    signed = [[[word - (word >> 31 << 32) for word in row] for row in plane] for plane in words]
    return torch.tensor(signed, dtype=torch.int32).reshape(-(-columns // 32), bits, rows)


def unsigned(planes_WPO: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in planes_WPO.reshape(-1).tolist()]


def test_bit_t_of_word_0_is_column_t() -> None:
    for column in range(32):
        codes_OI = torch.zeros(1, 64, dtype=torch.uint8)
        codes_OI[0, column] = 1
        assert unsigned(pack_planes(codes_OI, 1)) == [1 << column, 0]


def test_golden_words() -> None:
    codes_OI = (torch.arange(40) % 8).to(torch.uint8)[None]
    # Bits 0, 1 and 2 of 0 1 2 3 4 5 6 7, four times, then eight columns and padding.
    assert unsigned(pack_planes(codes_OI, 3)) == [0xAAAAAAAA, 0xCCCCCCCC, 0xF0F0F0F0, 0xAA, 0xCC, 0xF0]
    two_rows_OI = torch.tensor([[1, 2, 3, 0, 0], [3, 0, 0, 0, 2]], dtype=torch.uint8)
    assert pack_planes(two_rows_OI, 2).tolist() == [[[0b101, 0b1], [0b110, 0b10001]]]
    assert unsigned(pack_planes(torch.full((1, 32), 128, dtype=torch.uint8), 8)) == [0] * 7 + [0xFFFFFFFF]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 96, 100, 128])
def test_equal_to_the_rule_bit_by_bit(bits: int, columns: int) -> None:
    codes_OI = random_codes(3, columns, bits)
    planes_WPO = pack_planes(codes_OI, bits)
    assert planes_WPO.dtype == torch.int32
    assert torch.equal(planes_WPO, slow_planes(codes_OI, bits))
    assert torch.equal(unpack_planes(planes_WPO, columns), codes_OI)


@settings(deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), bits=st.integers(1, 8), seed=st.integers(0, 1000))
def test_round_trip(rows: int, columns: int, bits: int, seed: int) -> None:
    codes_OI = random_codes(rows, columns, bits, seed=seed)
    planes_WPO = pack_planes(codes_OI, bits)
    assert planes_WPO.shape == (-(-columns // 32), bits, rows)
    assert torch.equal(unpack_planes(planes_WPO, columns), codes_OI)
    assert num_set_padding_bits(planes_WPO, columns) == 0


def test_several_chunks_give_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    codes_OI = random_codes(37, 4096, 3)
    whole = pack_planes(codes_OI, 3)
    monkeypatch.setattr(planes, "CHUNK_CODES", 5 * 4096)
    assert torch.equal(pack_planes(codes_OI, 3), whole)
    assert torch.equal(unpack_planes(whole, 4096), codes_OI)
    monkeypatch.setattr(planes, "CHUNK_CODES", 1)
    assert torch.equal(pack_planes(codes_OI, 3), whole)


def test_strides_and_other_integers() -> None:
    codes_OI = random_codes(7, 65, 4)
    wide_OI = codes_OI.to(torch.int64).t().contiguous().t()
    assert torch.equal(pack_planes(wide_OI, 4), pack_planes(codes_OI, 4))
    planes_WPO = pack_planes(codes_OI, 4)
    strided_WPO = planes_WPO.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(unpack_planes(strided_WPO, 65), codes_OI)


def test_empty() -> None:
    assert pack_planes(torch.empty(0, 64, dtype=torch.uint8), 2).shape == (2, 2, 0)
    assert pack_planes(torch.empty(3, 0, dtype=torch.uint8), 2).shape == (0, 2, 3)
    assert unpack_planes(torch.empty(0, 2, 3, dtype=torch.int32), 0).shape == (3, 0)


def test_padding_is_counted_and_ignored() -> None:
    codes_OI = random_codes(4, 33, 2)
    planes_WPO = pack_planes(codes_OI, 2)
    planes_WPO[1, 1, 2] |= 1 << 1
    planes_WPO[1, 0, 3] |= -(2**31)
    assert num_set_padding_bits(planes_WPO, 33) == 2
    assert torch.equal(unpack_planes(planes_WPO, 33), codes_OI)
    assert num_set_padding_bits(torch.full((1, 2, 4), -1, dtype=torch.int32), 32) == 0


def test_codes_that_do_not_fit_are_a_bug() -> None:
    with pytest.raises(OptGPTQError, match="codes from 0 to 3, found 0 to 4"):
        pack_planes(torch.tensor([[0, 4]]), 2)


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(FormatError, match="1 to 8 planes"):
        pack_planes(torch.zeros(1, 32, dtype=torch.uint8), bits)
    with pytest.raises(FormatError, match="1 to 8 planes"):
        unpack_planes(torch.zeros(1, bits, 4, dtype=torch.int32), 32)


@pytest.mark.parametrize(
    "planes_WPO", [torch.zeros(2, 2, 4, dtype=torch.int32), torch.zeros(1, 2, 4), torch.zeros(1, 4, dtype=torch.int32)]
)
def test_wrong_shapes_are_refused(planes_WPO: torch.Tensor) -> None:
    with pytest.raises(FormatError, match=r"int32 \[1, planes, rows\] for 32 columns"):
        unpack_planes(planes_WPO, 32)
