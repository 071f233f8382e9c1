"""Sections of a recipe about weights: how they are quantized, and how binary codes are found."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, StrictStr, model_validator

from optgptq.recipe.section import FloatDtype, GroupSize, Pattern, Section, Share, impossible

Method = Literal["rtn", "gptq", "attention_aware", "gptqt", "binary", "attention_aware_binary"]
MethodOrNone = Literal["none", "rtn", "gptq", "attention_aware", "gptqt", "binary", "attention_aware_binary"]
BINARY_METHODS: frozenset[Method] = frozenset(("gptqt", "binary", "attention_aware_binary"))
Bits = Literal[2, 3, 4, 8]
ColumnOrder = Literal["natural", "activation", "group_aware", "min_pivot"]
GridSearch = Literal["minmax", "mse", "hessian", "pivot", "walk"]
GroupGrids = Literal["dynamic", "static"]
TargetShift = Literal["off", "exact", "gptaq"]
CodeWeighting = Literal["none", "diagonal", "pivot"]
CoefficientStorage = Literal["float", "int8", "steps"]


class WeightRule(Section):
    """What differs for the linears whose full name matches. Fields left out keep the value they have without it."""

    match: Pattern = Field(description="regular expression searched in the full name of each linear")
    description: StrictStr = Field(default="", description="why; shown in the log and in the record")
    method: Method | None = Field(default=None, description="solver of these linears")
    bits: Bits | None = Field(default=None, description="bits per code of these linears")
    group_size: GroupSize | None = Field(default=None, description="columns per group of these linears")
    symmetric: StrictBool | None = Field(default=None, description="symmetric grids for these linears")
    grid_search: GridSearch | None = Field(default=None, description="range search of these linears")
    keep_dense: StrictBool | None = Field(default=None, description="true leaves these linears as they are")


class WeightRecipe(Section):
    """How weights are quantized."""

    method: MethodOrNone = Field(
        default="gptq",
        description="none leaves all weights as they are; rtn rounds to nearest; gptq compensates each column's error "
        "in the next; attention_aware also sees what attention makes of queries, keys and values (section attention); "
        "binary and attention_aware_binary do the same with sums of signs in place of uniform grids (section binary); "
        "gptqt is binary as published",
    )
    bits: Bits = Field(default=4, description="bits per code")
    group_size: GroupSize = Field(default=128, description="columns that share a scale; -1 for one scale per row")
    symmetric: StrictBool = Field(default=True, description="zero point fixed in the middle of the grid")
    order: ColumnOrder = Field(default="group_aware", description="order in which columns are quantized")
    grid_search: GridSearch = Field(default="walk", description="how the range of each group is chosen")
    group_grids: GroupGrids = Field(
        default="dynamic", description="ranges from compensated weights, or all before the start"
    )
    damp_ratio: float = Field(
        default=0.01, strict=True, gt=0, lt=1, description="share of the mean diagonal added to the diagonal"
    )
    column_block: int = Field(default=16, strict=True, ge=1, le=4096, description="columns updated one by one")
    solver_dtype: FloatDtype = Field(default="float32", description="arithmetic of the solve")
    target_shift: TargetShift = Field(
        default="off",
        description="exact: each linear also makes up for the errors made before it; gptaq: the published column rule, "
        "to reproduce published tables",
    )
    shift_strength: Literal["held_out"] | Share = Field(
        default="held_out", description="share of the target shift; held_out: of each linear what is best on other text"
    )
    scale_refit: StrictBool = Field(default=False, description="fit the scales once more to the codes")
    code_sweeps: int = Field(
        default=0, strict=True, ge=0, le=100, description="sweeps that move single codes where the loss falls"
    )
    true_sequential: StrictBool = Field(
        default=True, description="stage by stage inside a decoder layer; false: one pass"
    )
    keep_dense: tuple[Pattern, ...] = Field(
        default=(), description="linears whose name matches any of these stay dense"
    )
    rules: tuple[WeightRule, ...] = Field(
        default=(), description="exceptions, applied in order; the last that matches wins"
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.group_grids == "static" or self.order not in ("activation", "min_pivot"):
            return self
        sizes = [("group_size", self.group_size)]
        sizes += [(f"rules.{index}.group_size", rule.group_size or -1) for index, rule in enumerate(self.rules)]
        for field, size in sizes:
            if size != -1:
                raise impossible(
                    "order",
                    expected="group_aware or natural while groups are contiguous and group_grids is dynamic",
                    found=f"order {self.order} with {field} {size} and group_grids dynamic",
                    action="Set weights.group_grids=static, weights.order=group_aware or weights.group_size=-1.",
                )
        return self


class BinaryRecipe(Section):
    """How binary codes are found by the methods that make them; other methods leave it unused."""

    intermediate_bits: Annotated[int, Field(strict=True, ge=3, le=6)] | None = Field(
        default=None,
        description="width of the whole numbers among which levels are searched; null: 2 more than bits, at most 5",
    )
    weighting: CodeWeighting = Field(
        default="pivot",
        description="price of an error in that search: none, the moment's diagonal, or pivot, what it costs in the end",
    )
    uniform_start: StrictBool = Field(default=True, description="the cheapest uniform grid is tried as well")
    refits: int = Field(
        default=3, strict=True, ge=0, le=100, description="fits of a group's coefficients, each with a new walk"
    )
    sweeps: int = Field(
        default=2, strict=True, ge=0, le=100, description="rounds of fitting all coefficients and improving all codes"
    )
    coefficients: CoefficientStorage = Field(
        default="int8",
        description="how coefficients are stored: float (float16), int8 with a scale of the row, or steps: one shape "
        "for a row, a scale and an offset for each group",
    )
