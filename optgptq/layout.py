"""What is decided about each linear before any of it is solved: the record that pipeline and formats share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How the coefficients of binary codes are stored: as floats, as bytes in units of a scale of the row, or as small whole
# steps of the row in units of a scale of the group.
CoefficientStorage = Literal["float", "int8", "steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayout:
    """How one linear of the model will be stored.

    Attributes:
        name: full module name in the checkpoint, for example `model.layers.0.self_attn.q_proj`.
        out_features: rows `O`.
        in_features: columns `I`.
        bits: bits per code; None when the linear stays dense.
        group_size: columns per group, -1 for one group per row. It divides `in_features`.
        symmetric: zero points are all `2**(bits - 1)` and need not be stored where a layout can say so.
        coefficients: how coefficients are stored; None where the grid is uniform and has none. Binary codes have no
            zero points: `symmetric` is False then.
        stored_transposed: the dense checkpoint stores `[I, O]` (GPT-2's Conv1D).
        fused_names: names of the linears that engines load as one, this one included, in their order.
        fused_name: name that engines give to the fused linear; equal to `name` where there is none.
        dense_reason: why the linear stays dense; None when it is quantized.
    """

    name: str
    out_features: int
    in_features: int
    bits: int | None
    group_size: int = -1
    symmetric: bool = True
    coefficients: CoefficientStorage | None = None
    stored_transposed: bool = False
    fused_names: tuple[str, ...] = ()
    fused_name: str = ""
    dense_reason: str | None = None

    @property
    def num_groups(self) -> int:
        return 1 if self.group_size == -1 else self.in_features // self.group_size
