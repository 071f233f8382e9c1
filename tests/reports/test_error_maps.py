"""Block root mean squares of a weight and its error, against loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import round_to_nearest

from optgptq.affine_weight import AffineWeight
from optgptq.layout import LinearLayout
from optgptq.reports.error_maps import error_map, worst_linears


def rounded(dense_OI: torch.Tensor, bits: int = 3) -> AffineWeight:
    rows, columns = dense_OI.shape
    layout = LinearLayout(
        name="linear", out_features=rows, in_features=columns, bits=bits, group_size=-1, symmetric=True
    )
    return round_to_nearest(dense_OI, layout, scale_dtype=torch.float32)


def slow_map(values_OI: torch.Tensor, cells: int) -> list[list[float]]:
    """Loop over blocks and numbers, float64."""
    rows, columns = values_OI.shape
    num_rows, num_columns = min(cells, rows), min(cells, columns)
    found = []
    for r in range(num_rows):
        line = []
        for c in range(num_columns):
            squares = [
                values_OI[i, j].item() ** 2
                for i in range(rows * r // num_rows, rows * (r + 1) // num_rows)
                for j in range(columns * c // num_columns, columns * (c + 1) // num_columns)
            ]
            line.append(math.sqrt(sum(squares) / len(squares)))
        found.append(line)
    return found


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 23), columns=st.integers(1, 29), cells=st.integers(1, 9), seed=st.integers(0, 99))
def test_blocks_are_root_mean_squares(rows: int, columns: int, cells: int, seed: int) -> None:
    dense_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = rounded(dense_OI)
    found = error_map(dense_OI, weight, cells=cells)
    assert (found.rows, found.columns) == (rows, columns)
    for mine, values_OI in ((found.weight, dense_OI), (found.error, dense_OI - weight.dequantize())):
        expected = slow_map(values_OI, cells)
        assert [len(row) for row in mine] == [len(row) for row in expected]
        for row, other in zip(mine, expected, strict=True):
            assert row == pytest.approx(other, rel=6e-3, abs=1e-6)


def test_numbers_have_three_digits() -> None:
    found = error_map(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), rounded(torch.ones(8, 8)))
    assert all(value == float(f"{value:.3g}") for row in (*found.weight, *found.error) for value in row)


def test_a_bfloat16_weight_that_is_exact_has_no_error() -> None:
    dense_OI = torch.ones(5, 7, dtype=torch.bfloat16)
    found = error_map(dense_OI, rounded(dense_OI.float(), bits=8), cells=2)
    assert found.weight == ((1.0, 1.0), (1.0, 1.0))
    assert max(max(row) for row in found.error) < 0.005


def test_the_worst_are_kept() -> None:
    shown = error_map(torch.ones(2, 2), rounded(torch.ones(2, 2)))
    records = [shown.record(f"linear {place}", loss) for place, loss in enumerate([0.1, 0.5, 0.3, float("nan"), 0.5])]
    assert [record["name"] for record in worst_linears(records, num_linears=3)] == ["linear 1", "linear 4", "linear 2"]
    assert set(records[0]) == {"name", "loss", "rows", "columns", "weight", "error"}
    assert len(worst_linears(records * 3)) == 6
