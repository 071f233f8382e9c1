"""Sums of signs: the dense matrix is the definition's, in every storage and column order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.binary_weights import STORAGES, plane_layout, random_binary, same_binary, slow_dense

from optgptq.binary_weight import BinaryWeight
from optgptq.coefficients import ByteCoefficients, FloatCoefficients, StepCoefficients
from optgptq.layout import CoefficientStorage


@settings(deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    group_size=st.sampled_from([-1, 7, 32]),
    storage=st.sampled_from(STORAGES),
    ordered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_dense_matrix_is_that_of_the_definition(
    bits: int, rows: int, columns: int, group_size: int, storage: CoefficientStorage, ordered: bool, seed: int
) -> None:
    layout = plane_layout(rows=rows, columns=columns, bits=bits, group_size=group_size, coefficients=storage)
    weight = random_binary(layout, seed=seed, ordered=ordered)
    largest = float(weight.levels().abs().max())
    torch.testing.assert_close(weight.dequantize().double(), slow_dense(weight), rtol=0, atol=1e-6 * max(largest, 1))


def test_signs_and_bits_of_0_and_1_are_the_same_weight() -> None:
    weight = random_binary(plane_layout(bits=4), seed=3)
    alpha_OGP, offset_OG = (values.double() for values in weight.coefficients.values())
    # To bits: coefficients twice as large, the constant below all; and back.
    bit_OGP, constant_OG = 2 * alpha_OGP, offset_OG - alpha_OGP.sum(dim=2)
    bits_OIP = (weight.codes_OI[:, :, None] >> torch.arange(4)) & 1
    group_I = torch.arange(64) // 32
    dense_OI = constant_OG[:, group_I] + (bit_OGP[:, group_I] * bits_OIP).sum(dim=2)
    torch.testing.assert_close(weight.dequantize().double(), dense_OI, rtol=0, atol=1e-6)
    back = FloatCoefficients((bit_OGP / 2).half(), (constant_OG + (bit_OGP / 2).sum(dim=2)).half())
    assert same_binary(replace(weight, coefficients=back), weight)


@pytest.mark.parametrize("storage", STORAGES)
def test_sound_weights_have_no_problems(storage: CoefficientStorage) -> None:
    weight = random_binary(plane_layout(coefficients=storage), ordered=True)
    assert list(weight.problems()) == []
    assert weight.laid_out(plane_layout()).coefficients == storage
    assert weight.laid_out(plane_layout()).symmetric is False


def spoil(weight: BinaryWeight, field: str, value: float) -> BinaryWeight:
    tensor = {name: getattr(weight.coefficients, name) for name in weight.coefficients.__slots__}[field].clone()
    tensor.reshape(-1)[1] = value
    return replace(weight, coefficients=replace(weight.coefficients, **{field: tensor}))  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("storage", "field", "value", "part", "expected"),
    [
        ("float", "alpha_OGP", torch.nan, "coefficients", "finite values that are not negative"),
        ("float", "alpha_OGP", -1, "coefficients", "finite values that are not negative"),
        ("float", "offset_OG", torch.inf, "offsets", "finite values"),
        ("int8", "alpha_OGP", -1, "coefficients", "finite values that are not negative"),
        ("int8", "row_scale_O", 0, "row scales", "finite values that are positive"),
        ("int8", "row_scale_O", torch.nan, "row scales", "finite values that are positive"),
        ("steps", "steps_OP", 0, "steps", "finite values that are positive"),
        ("steps", "scale_OG", -1, "scales", "finite values that are not negative"),
        ("steps", "offset_OG", torch.nan, "offsets", "finite values"),
    ],
)
def test_each_bad_value_is_a_problem(
    storage: CoefficientStorage, field: str, value: float, part: str, expected: str
) -> None:
    weight = spoil(random_binary(plane_layout(coefficients=storage)), field, value)
    ((found_part, found_expected, found),) = weight.problems()
    assert (found_part, found_expected) == (part, expected)
    assert found.startswith("1 of ")


def test_a_column_order_is_a_permutation() -> None:
    weight = random_binary(plane_layout(), ordered=True)
    assert weight.column_order_I is not None
    twice_I = weight.column_order_I.clone()
    twice_I[0] = twice_I[1]
    ((part, expected, found),) = replace(weight, column_order_I=twice_I).problems()
    assert (part, expected) == ("column order", "each of 64 columns once")
    assert found.startswith("63 distinct columns")


def test_floating_dtypes_change_only_without_rounding() -> None:
    for storage in STORAGES:
        weight = random_binary(plane_layout(coefficients=storage))
        assert weight.scale_dtype == torch.float16
        wide = weight.with_scale_dtype(torch.float32)
        assert wide.scale_dtype == torch.float32
        assert torch.equal(wide.dequantize(), weight.dequantize())
        assert [tensor.dtype for tensor in wide.coefficients.tensors() if not tensor.is_floating_point()] == [
            tensor.dtype for tensor in weight.coefficients.tensors() if not tensor.is_floating_point()
        ]
        assert same_binary(wide.with_scale_dtype(torch.float16), weight)
    fine = replace(weight, coefficients=FloatCoefficients(torch.full((5, 2, 3), 1 + 2**-20), torch.zeros(5, 2)))
    assert fine.scales_fit(torch.float32)
    assert not fine.scales_fit(torch.float16)
    with pytest.raises(ValueError, match=r"coefficients are not exact in torch\.float16"):
        fine.with_scale_dtype(torch.float16)


def test_stored_bits_are_those_of_the_research() -> None:
    """At group 128: `q + 16 (q + 1) / g`, and `q + 8 (q + 1) / g` with a scale for each row."""
    for bits in (2, 3, 4):
        for storage, coefficient_bits in (("float", 16), ("int8", 8)):
            layout = plane_layout(rows=16, columns=4096, bits=bits, group_size=128, coefficients=storage)
            stored = random_binary(layout).stored_bits(zero_points_stored=True) / (16 * 4096)
            per_row = 16 / 4096 if storage == "int8" else 0
            assert stored == pytest.approx(bits + coefficient_bits * (bits + 1) / 128 + per_row)


def test_rows_keep_what_belongs_to_the_whole() -> None:
    for storage in STORAGES:
        weight = random_binary(plane_layout(coefficients=storage), ordered=True)
        assert torch.equal(weight.rows(1, 4).dequantize(), weight.dequantize()[1:4])


def test_values_of_each_storage() -> None:
    bytes_ = ByteCoefficients(
        torch.tensor([[[3, 1]]], dtype=torch.int8), torch.tensor([[-2]], dtype=torch.int8), torch.tensor([0.5])
    )
    assert [values.tolist() for values in bytes_.values()] == [[[[1.5, 0.5]]], [[-1.0]]]
    steps = StepCoefficients(torch.tensor([[4, 1]], dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([[3.0]]))
    assert [values.tolist() for values in steps.values()] == [[[[1.0, 0.25]]], [[3.0]]]
