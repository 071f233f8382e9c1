"""Products with sign planes in plain torch, against a literal float64 product."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.live_bytes import LiveBytes
from support.packed_binaries import binary_weight, slow_product

from optgptq import kernels
from optgptq.binary_weight import BinaryWeight
from optgptq.coefficients import ByteCoefficients, FloatCoefficients, StepCoefficients
from optgptq.errors import FormatError
from optgptq.kernels import choose_binary_matmul
from optgptq.kernels.binary import binary_matmul, binary_matmul_literal
from optgptq.kernels.packed_binary import arrange_codes, arrange_inputs
from optgptq.runtime.linear import pack_binary

CUDA = torch.device("cuda")


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 140),
    group_words=st.sampled_from([1, 2, 3, None]),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    weights_per_chunk=st.sampled_from([1, 300, 10_000]),
    leading=st.sampled_from([(1,), (5,), (2, 3), (0,)]),
    shuffled=st.booleans(),
)
def test_equals_the_slow_product_for_every_chunking(
    rows, columns, group_words, bits, weights_per_chunk, leading, shuffled
):
    group_size = -1 if group_words is None else 32 * group_words
    weight = binary_weight(rows, columns, bits=bits, group_size=group_size, seed=rows, shuffled=shuffled)
    packed = pack_binary(weight)
    x = torch.randn(*leading, columns, generator=torch.Generator().manual_seed(columns))
    bias_O = torch.linspace(-1, 1, rows)
    expected = slow_product(x, weight) + bias_O.double()
    output = binary_matmul(x, packed, bias_O=bias_O, weights_per_chunk=weights_per_chunk)
    assert output.shape == (*leading, rows)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(binary_matmul_literal(x, packed, bias_O=bias_O), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group_size", [32, 96, 500])
def test_unit_inputs_give_the_columns_of_the_weight_to_the_bit(group_size):
    weight = binary_weight(7, 500, bits=3, group_size=group_size, shuffled=True)
    output_IO = binary_matmul(torch.eye(500), pack_binary(weight), weights_per_chunk=2000)
    assert torch.equal(output_IO.T, weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_kept_and_summed_in_float32_or_better(dtype):
    weight = binary_weight(11, 200, bits=2, group_size=64)
    x = torch.randn(4, 200).to(dtype)
    expected = slow_product(x, weight)
    output = binary_matmul(x, pack_binary(weight))
    assert output.dtype == dtype
    error = float((output.double() - expected).abs().max() / expected.abs().max())
    assert error <= torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("coefficients", "dtype"),
    [
        (FloatCoefficients(torch.rand(5, 2, 2).half(), torch.rand(5, 2).half()), torch.float16),
        (FloatCoefficients(torch.rand(5, 2, 2), torch.rand(5, 2).half().float()), torch.float32),
        (
            ByteCoefficients(
                torch.randint(0, 127, (5, 2, 2), dtype=torch.int8),
                torch.randint(-9, 9, (5, 2), dtype=torch.int8),
                torch.rand(5).half(),
            ),
            torch.float32,
        ),
        (
            StepCoefficients(torch.tensor([[2, 1]] * 5, dtype=torch.uint8), torch.ones(5, 2).half(), torch.zeros(5, 2)),
            torch.float16,
        ),
    ],
)
def test_coefficients_are_held_in_half_the_bytes_only_where_that_is_exact(coefficients, dtype):
    codes_OI = torch.randint(0, 4, (5, 64), dtype=torch.uint8)
    weight = BinaryWeight(codes_OI=codes_OI, coefficients=coefficients, bits=2, group_size=32)
    packed = pack_binary(weight)
    assert packed.alpha_GPO.dtype == packed.offset_GO.dtype == dtype
    alpha_OGP, offset_OG = coefficients.values()
    assert torch.equal(packed.alpha_GPO.float().permute(2, 0, 1), alpha_OGP)
    assert torch.equal(packed.offset_GO.float().T, offset_OG)


def test_packed_planes_take_a_bit_for_each_plane_and_weight():
    weight = binary_weight(64, 4096, bits=3, group_size=128)
    packed = pack_binary(weight)
    assert packed.planes_WPO.shape == (128, 3, 64)
    assert (packed.out_features, packed.in_features, packed.bits, packed.num_groups) == (64, 4096, 3, 32)
    assert packed.nbytes * 8 / (64 * 4096) == 3 + 16 * (3 + 1) / 128


def test_a_word_holds_its_columns_so_that_neighbours_are_sixteen_bits_apart():
    codes_OI = torch.zeros(1, 64, dtype=torch.uint8)
    codes_OI[0, [0, 1, 2, 31, 33]] = 1
    one = FloatCoefficients(torch.ones(1, 1, 1), torch.zeros(1, 1))
    packed = pack_binary(BinaryWeight(codes_OI=codes_OI, coefficients=one, bits=1, group_size=64))
    # One group for a row: words are filled up to the four of a step.
    assert packed.planes_WPO.shape == (4, 1, 1)
    assert [hex(int(word) & 0xFFFFFFFF) for word in packed.planes_WPO[:2, 0, 0]] == ["0x80010003", "0x10000"]
    columns_OI = torch.arange(64, dtype=torch.uint8)[None]
    assert torch.equal(arrange_codes(columns_OI, 64).long(), arrange_inputs(columns_OI.long(), 4))


def test_groups_that_end_inside_a_word_are_refused():
    with pytest.raises(FormatError, match=r"multiple of 32 columns.*groups of 20 columns in rows of 60.*dequantize"):
        pack_binary(binary_weight(2, 60, bits=2, group_size=20))


def test_the_whole_dense_weight_is_never_there():
    rows, columns, chunk = 512, 1024, 1 << 15
    packed = pack_binary(binary_weight(rows, columns, bits=3, group_size=128))
    x = torch.randn(2, columns)
    with LiveBytes() as live:
        binary_matmul(x, packed, weights_per_chunk=chunk)
    # Per weight of a chunk: its value, its sign, three indices of eight signs, and planes as words.
    assert 8 * chunk < live.peak < 12 * chunk + 60_000
    assert live.peak < rows * columns * 4 / 4


def test_inputs_of_a_move_to_another_device_stay_what_they_are():
    packed = pack_binary(binary_weight(3, 64, bits=2, group_size=32, shuffled=True))
    moved = packed.to("cpu")
    x = torch.randn(2, 64)
    assert torch.equal(binary_matmul(x, moved), binary_matmul(x, packed))


def test_on_a_gpu_the_choice_says_what_is_lost(monkeypatch):
    wide = choose_binary_matmul(CUDA, torch.float32)
    assert (wide.name, wide.is_makeshift) == ("torch", True)
    assert "the triton kernel takes float16 and bfloat16" in wide.reason
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    without = choose_binary_matmul(CUDA, torch.float16)
    assert (without.name, without.is_makeshift, without.call) == ("torch", True, binary_matmul)
    assert "`pip install optgptq[triton]`" in without.reason


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: there are no wheels but for Linux")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_with_triton_its_kernel_is_taken(dtype):
    choice = choose_binary_matmul(CUDA, dtype)
    assert (choice.name, choice.is_makeshift) == ("triton", False)
    assert "from 64 tokens on" in choice.reason
    assert choice.call is not binary_matmul
