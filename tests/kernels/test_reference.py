"""The reference kernel against a literal float64 product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import random_weight

from optgptq.affine_weight import AffineWeight
from optgptq.kernels import choose_affine_matmul
from optgptq.kernels.reference import affine_matmul
from optgptq.layout import LinearLayout


def layout(rows: int, columns: int, *, bits: int = 4, group_size: int = -1, symmetric: bool = False) -> LinearLayout:
    return LinearLayout(
        name="linear", out_features=rows, in_features=columns, bits=bits, group_size=group_size, symmetric=symmetric
    )


def slow_product(x: torch.Tensor, weight: AffineWeight) -> torch.Tensor:
    """Element by element in float64."""
    rows, columns = weight.codes_OI.shape
    dense_OI = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            group = column // weight.group_size
            if weight.group_index_I is not None:
                group = int(weight.group_index_I[column])
            offset = int(weight.codes_OI[row, column]) - int(weight.zero_point_OG[row, group])
            dense_OI[row, column] = float(weight.scale_OG[row, group]) * offset
    return x.double() @ dense_OI.T


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 13),
    num_groups=st.integers(1, 3),
    group_size=st.sampled_from([1, 3, 16]),
    bits=st.sampled_from([2, 3, 4, 8]),
    weights_per_chunk=st.sampled_from([1, 7, 60, 10_000]),
    leading=st.sampled_from([(1,), (5,), (2, 3)]),
)
def test_equals_the_slow_product_for_every_chunking(rows, num_groups, group_size, bits, weights_per_chunk, leading):
    columns = num_groups * group_size
    weight = random_weight(layout(rows, columns, bits=bits, group_size=group_size), seed=rows)
    x = torch.randn(*leading, columns, generator=torch.Generator().manual_seed(columns))
    bias_O = torch.linspace(-1, 1, rows)
    output = affine_matmul(x, weight, bias_O=bias_O, weights_per_chunk=weights_per_chunk)
    expected = slow_product(x, weight) + bias_O.double()
    assert output.shape == (*leading, rows)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-4)


def test_columns_in_the_order_of_an_act_order_checkpoint():
    plain = random_weight(layout(6, 30, group_size=10))
    index_I = torch.randperm(30, generator=torch.Generator().manual_seed(3)).to(torch.int32) // 10
    weight = AffineWeight(
        codes_OI=plain.codes_OI,
        scale_OG=plain.scale_OG,
        zero_point_OG=plain.zero_point_OG,
        bits=4,
        group_size=10,
        symmetric=False,
        group_index_I=index_I,
    )
    x = torch.randn(4, 30)
    torch.testing.assert_close(affine_matmul(x, weight).double(), slow_product(x, weight), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(affine_matmul(x, weight, weights_per_chunk=40), affine_matmul(x, weight))


def test_half_precision_inputs_keep_their_dtype():
    weight = random_weight(layout(8, 32, group_size=16))
    x = torch.randn(3, 32).to(torch.bfloat16)
    output = affine_matmul(x, weight, weights_per_chunk=64)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), slow_product(x, weight), rtol=0.05, atol=0.2)


def test_rows_take_the_rows_of_everything():
    weight = random_weight(layout(9, 32, group_size=16))
    part = weight.rows(2, 5)
    assert part.out_features == 3
    assert torch.equal(part.dequantize(), weight.dequantize()[2:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_says_what_it_is(dtype, monkeypatch):
    monkeypatch.setattr("optgptq.kernels.takes_native", lambda *_: False)
    choice = choose_affine_matmul(torch.device("cpu"), dtype)
    assert choice.operation == "affine_matmul"
    assert choice.name == "reference"
    assert "cpu" in choice.reason
    assert choice.is_makeshift
    assert choice.call is affine_matmul
