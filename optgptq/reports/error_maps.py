"""Where in a linear its weights are large and where quantization moved them: root mean squares of blocks.

Shapes: `O` output rows, `I` input columns, `o` rows of one block, `R` blocks of rows, `C` blocks of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from optgptq.quantized_weight import QuantizedWeight
from optgptq.reports.wording import number

WORST_MAPS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorMap:
    """Root mean squares over blocks of a linear, three significant digits.

    Attributes:
        rows, columns: of the linear.
        weight: `[R][C]`, of the dense weight.
        error: `[R][C]`, of the dense weight less the quantized one.
    """

    rows: int
    columns: int
    weight: tuple[tuple[float, ...], ...]
    error: tuple[tuple[float, ...], ...]

    def record(self, name: str, loss: float) -> dict[str, Any]:
        """Return the entry of a run record for linear `name`; `loss` decides which entries are kept."""
        return {
            "name": name,
            "loss": loss,
            "rows": self.rows,
            "columns": self.columns,
            "weight": [list(row) for row in self.weight],
            "error": [list(row) for row in self.error],
        }


def error_map(dense_OI: torch.Tensor, weight: QuantizedWeight, *, cells: int = 32) -> ErrorMap:
    """Return block root mean squares of `dense_OI` and of its difference to `weight`.

    A side is cut into `cells` blocks, or as many as it is long; their sizes differ by one at most. One block of rows is
    decoded at a time, in float32; sums over a block are float64.
    """
    out_features, in_features = dense_OI.shape
    num_rows, num_columns = min(cells, out_features), min(cells, in_features)
    column_ends = _ends(in_features, num_columns)
    weight_rows, error_rows = [], []
    begin = 0
    for end in _ends(out_features, num_rows):
        dense_oI = dense_OI[begin:end].to(torch.float32)
        error_oI = dense_oI - weight.rows(begin, end).dequantize().to(dense_oI.device)
        weight_rows.append(_block_means(dense_oI, column_ends))
        error_rows.append(_block_means(error_oI, column_ends))
        begin = end
    return ErrorMap(rows=out_features, columns=in_features, weight=tuple(weight_rows), error=tuple(error_rows))


def worst_linears(layers: Iterable[Mapping[str, Any]], *, num_linears: int = WORST_MAPS) -> list[Mapping[str, Any]]:
    """Return those of the entries about linears that have the highest `loss`; among equals the first come first."""
    return sorted(layers, key=lambda layer: -(number(layer.get("loss")) or 0.0))[:num_linears]


def _ends(size: int, num_blocks: int) -> list[int]:
    return [size * (block + 1) // num_blocks for block in range(num_blocks)]


def _block_means(values_oI: torch.Tensor, column_ends: list[int]) -> tuple[float, ...]:
    """Return the root mean square of each block of columns."""
    sums_I = values_oI.square().sum(dim=0, dtype=torch.float64)
    ends_C = torch.tensor(column_ends, device=sums_I.device)
    totals_C = sums_I.cumsum(0)[ends_C - 1]
    begins_C = torch.cat([ends_C.new_zeros(1), ends_C[:-1]])
    sums_C = totals_C.diff(prepend=totals_C.new_zeros(1)).clamp(min=0)
    means_C = (sums_C / ((ends_C - begins_C) * values_oI.shape[0])).sqrt()
    return tuple(float(f"{value:.3g}") for value in means_C.tolist())
