"""Section of a recipe about the output head: a large part of what a small model reads for every token."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictBool

from optgptq.recipe.section import GroupSize, Section, impossible
from optgptq.recipe.weights import WeightRecipe

HeadMethod = Literal["rtn", "gptq"]
# What means something where the head is quantized.
DETAILS = ("group_size", "symmetric", "method")


class HeadRecipe(Section):
    """How the output head is quantized. Order, damping, grid search and refinement are those of section weights."""

    bits: Literal[4, 8] | None = Field(default=None, description="bits per code; null leaves the head as it is")
    group_size: GroupSize | None = Field(
        default=None, description="columns that share a scale; -1 for one scale per row, null: as weights.group_size"
    )
    symmetric: StrictBool = Field(default=True, description="zero point fixed in the middle of the grid")
    method: HeadMethod = Field(
        default="gptq",
        description="rtn rounds to nearest; gptq compensates each column's error in the next, weighted by the second "
        "moment of the last hidden states",
    )

    @property
    def is_quantized(self) -> bool:
        return self.bits is not None


def require_possible(head: HeadRecipe, weights: WeightRecipe, *, export_format: str) -> None:
    """Raise pydantic's error where a head that shall be quantized does not go together with the other sections."""
    if export_format == "optgptq":
        raise impossible(
            "head.bits",
            expected="null with export.format optgptq, which holds sums of signs and nothing else",
            found=f"{head.bits}",
            action="Leave head.bits out, or choose a weights.method of uniform grids and another export.format.",
        )
    size = weights.group_size if head.group_size is None else head.group_size
    mixes = weights.order in ("activation", "min_pivot") and weights.group_grids == "dynamic"
    if head.method == "gptq" and mixes and size != -1:
        raise impossible(
            "head.group_size",
            expected=f"-1 with weights.order {weights.order} and weights.group_grids dynamic",
            found=f"{size}",
            action="Set head.group_size=-1, head.method=rtn, weights.group_grids=static or weights.order=group_aware.",
        )
