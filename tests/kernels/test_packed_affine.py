"""Words of codes for kernels: packed and read again, moved, stacked and refused."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_affines import affine_weight

from optgptq import kernels
from optgptq.affine_weight import AffineWeight
from optgptq.errors import FormatError
from optgptq.kernels import choose_affine_matmul
from optgptq.kernels.packed_affine import PackedAffine, fits_blocks, pack_affine
from optgptq.kernels.reference import affine_matmul
from optgptq.runtime.linear import HELD_KINDS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
has_triton = find_spec("triton") is not None


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 200),
    group_blocks=st.sampled_from([1, 2, 3, None]),
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    shuffled=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_what_is_packed_is_read_again_to_the_bit(rows, columns, group_blocks, bits, symmetric, shuffled, dtype):
    weight = affine_weight(
        rows,
        columns,
        bits=bits,
        group_size=-1 if group_blocks is None else 32 * group_blocks,
        symmetric=symmetric,
        seed=rows,
        shuffled=shuffled,
        negative=True,
    )
    packed = pack_affine(weight)
    assert (packed.out_features, packed.in_features, packed.num_groups) == (rows, columns, weight.num_groups)
    assert packed.bits >= bits
    assert torch.equal(packed.dequantize(dtype), weight.dequantize(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_word_has_its_columns_where_the_kernels_look(bits):
    """Literally: pair `t + W u` of a block is at bits `u * W` of both halves of word `t`, `W` words in all."""
    weight = affine_weight(5, 128, bits=bits, group_size=64)
    packed, width = pack_affine(weight), 2 if bits == 3 else bits
    words_BOW = packed.low_BOW.long() & 0xFFFFFFFF
    for column in range(128):
        pair, half = column % 32 // 2, column % 2
        place = pair // width * width + 16 * half
        codes_O = words_BOW[column // 32, :5, pair % width] >> place & ((1 << width) - 1)
        if bits == 3:
            turned_O = packed.high_BO[column // 32, :5].long() & 0xFFFFFFFF
            codes_O = codes_O | (turned_O >> (pair + 3 + 16 * half) % 32 & 1) << 2
        assert torch.equal(codes_O, weight.codes_OI[:, column].long())


@pytest.mark.parametrize(("bits", "symmetric", "expected"), [(4, True, 4.125), (4, False, 4.1875), (3, True, 3.125)])
def test_bits_of_a_weight(bits, symmetric, expected):
    packed = pack_affine(affine_weight(64, 1024, bits=bits, group_size=128, symmetric=symmetric))
    assert packed.nbytes * 8 / (64 * 1024) == expected
    assert (packed.zero_point_GO is None, packed.zero_point) == (symmetric, 2 ** (bits - 1) if symmetric else 0)


def test_rows_and_groups_are_filled_up():
    packed = pack_affine(affine_weight(65, 300, bits=4, group_size=128))
    assert (packed.low_BOW.shape, packed.scale_GO.shape) == ((12, 128, 4), (3, 128))
    assert (packed.row_blocks, packed.group_blocks, packed.step_blocks(4), packed.step_blocks(2)) == (2, 4, 4, 2)
    whole = pack_affine(affine_weight(3, 40, bits=3))
    assert (whole.low_BOW.shape, whole.high_BO.shape, whole.num_blocks) == ((4, 64, 2), (4, 64), 4)


def test_columns_that_are_in_order_need_no_order():
    weight = affine_weight(3, 64, bits=4, group_size=32)
    assert pack_affine(weight).column_order_I is None
    in_order = replace(weight, group_index_I=torch.arange(64, dtype=torch.int32) // 32)
    assert pack_affine(in_order).column_order_I is None
    shuffled = pack_affine(affine_weight(3, 64, bits=4, group_size=32, shuffled=True, seed=1))
    x = torch.randn(2, 64)
    assert torch.equal(shuffled.ordered(x), x[:, shuffled.column_order_I])


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_of_the_same_inputs_are_stacked(bits, symmetric):
    parts = [
        affine_weight(rows, 96, bits=bits, group_size=32, symmetric=symmetric, seed=rows, shuffled=False)
        for rows in (5, 64, 70)
    ]
    packed = [pack_affine(part) for part in parts]
    assert all(packed[0].stacks_with(other) for other in packed)
    stacked = PackedAffine.stacked(packed)
    assert torch.equal(stacked.dequantize(), AffineWeight.stacked(parts).dequantize())
    assert (stacked.out_features, stacked.row_blocks) == (139, 3)


@pytest.mark.parametrize(
    "other",
    [
        {"bits": 3},
        {"bits": 4, "group_size": 64},
        {"bits": 4, "symmetric": True},
        {"bits": 4, "shuffled": True, "seed": 3},
        {"bits": 4, "columns": 160},
    ],
)
def test_weights_that_differ_in_more_than_rows_are_not(other):
    sizes = {"rows": 4, "columns": 128, "group_size": 32} | other
    weight = affine_weight(sizes.pop("rows"), sizes.pop("columns"), **sizes)
    assert not pack_affine(affine_weight(4, 128, bits=4, group_size=32)).stacks_with(pack_affine(weight))


def test_groups_that_end_inside_a_block_are_refused():
    weight = affine_weight(2, 60, bits=2, group_size=20)
    assert not fits_blocks(weight)
    expected = r"multiple of 32 columns.*2 bits and groups of 20 columns in rows of 60.*dequantize"
    with pytest.raises(FormatError, match=expected):
        pack_affine(weight)


def test_groups_of_uneven_sizes_are_refused():
    weight = affine_weight(2, 64, bits=2, group_size=32)
    uneven_I = torch.tensor([0] * 31 + [1] * 33, dtype=torch.int32)
    assert not fits_blocks(replace(weight, group_index_I=uneven_I))


def test_a_move_to_another_device_changes_nothing():
    weight = affine_weight(3, 64, bits=3, group_size=32, shuffled=True, seed=5)
    assert torch.equal(pack_affine(weight).to("cpu").dequantize(), weight.dequantize())


def test_on_a_gpu_the_choice_says_what_is_lost(monkeypatch):
    wide = choose_affine_matmul(CUDA, torch.float32)
    assert (wide.name, wide.is_makeshift, wide.weight_type) == ("reference", True, AffineWeight)
    assert "the triton kernel takes float16 and bfloat16" in wide.reason
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    without = choose_affine_matmul(CUDA, torch.float16)
    assert (without.name, without.is_makeshift, without.call) == ("reference", True, affine_matmul)
    assert "`pip install optgptq[triton]`" in without.reason


@pytest.mark.skipif(not has_triton, reason="triton is not installed: there are no wheels but for Linux")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_with_triton_its_kernels_are_taken(dtype):
    choice = choose_affine_matmul(CUDA, dtype)
    assert (choice.name, choice.is_makeshift, choice.weight_type) == ("triton", False, PackedAffine)
    assert "for more than 64 tokens" in choice.reason


@pytest.mark.skipif(not has_triton, reason="triton is not installed: there are no wheels but for Linux")
def test_a_weight_is_held_as_the_kernel_of_its_device_takes_it():
    weight = affine_weight(3, 64, bits=4, group_size=32)
    unfit = affine_weight(3, 64, bits=4, group_size=16)
    kind = HELD_KINDS[AffineWeight]
    on_gpu, on_processor = (kind.choose(device, torch.float16) for device in (CUDA, CPU))
    # The choice is for a GPU, the place a processor: there is no GPU here.
    assert torch.equal(kind.hold(weight, on_gpu, CPU).dequantize(), weight.dequantize())
    assert isinstance(kind.hold(weight, on_gpu, CPU), PackedAffine)
    assert isinstance(kind.hold(weight, on_processor, CPU), on_processor.weight_type)
    assert [kind.fits(each, on_gpu) for each in (weight, unfit)] == [True, False]
    # Plain torch takes any groups, compiled products whole blocks of 32 columns.
    is_plain = on_processor.weight_type is AffineWeight
    assert [kind.fits(each, on_processor) for each in (weight, unfit)] == [True, is_plain]
