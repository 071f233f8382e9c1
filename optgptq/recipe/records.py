"""The recipe: frozen records, validated when they are built.

Field descriptions are what `optgptq recipes --schema` prints. Combinations that no run can obey are refused here; what
depends on the model (rules that match nothing, groups that do not divide) is checked where the model is known.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    model_validator,
)
from pydantic_core import PydanticCustomError

LONGEST_PATTERN = 1000

Method = Literal["rtn", "gptq", "attention_aware", "gptqt", "binary", "attention_aware_binary"]
BINARY_METHODS: frozenset[Method] = frozenset(("gptqt", "binary", "attention_aware_binary"))
Bits = Literal[2, 3, 4, 8]
ColumnOrder = Literal["natural", "activation", "group_aware", "min_pivot"]
GridSearch = Literal["minmax", "mse", "hessian", "pivot", "walk"]
GroupGrids = Literal["dynamic", "static"]
FloatDtype = Literal["float32", "float64"]
TargetShift = Literal["off", "exact", "gptaq"]
AttentionRows = Literal["off", "pooled", "softmax"]
RowOrder = Literal["natural", "activation"]
Rotation = Literal["none", "hadamard", "random"]
BosPolicy = Literal["none", "window", "document"]
WindowLayout = Literal["packed", "documents"]
CodeWeighting = Literal["none", "diagonal", "pivot"]
CoefficientStorage = Literal["float", "int8", "steps"]
FormatName = Literal["gptq", "gptq_v2", "compressed-tensors", "optgptq"]


def impossible(field: str, *, expected: str, found: str, action: str) -> PydanticCustomError:
    """Return the error for a combination of valid values that no run can obey; `field` is local to its section."""
    parts = {"field": field, "expected": expected, "found": found, "action": action}
    return PydanticCustomError("impossible_combination", "expected {expected}, found {found}. {action}", parts)


def _checked_pattern(pattern: str) -> str:
    if len(pattern) > LONGEST_PATTERN:
        raise PydanticCustomError(
            "bad_pattern",
            "{problem}",
            {"problem": f"a pattern of {len(pattern)} characters; {LONGEST_PATTERN} are allowed"},
        )
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise PydanticCustomError("bad_pattern", "{problem}", {"problem": f"{pattern!r} ({error})"}) from error
    return pattern


SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _size_in_bytes(value: object) -> object:
    """Turn `5GB` or `1.5 GiB` into bytes; anything else is left for the type check."""
    match = regex.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([KMG]i?B)", value) if isinstance(value, str) else None
    return value if match is None else int(float(match[1]) * SIZE_UNITS[match[2]])


Pattern = Annotated[StrictStr, AfterValidator(_checked_pattern), Field(json_schema_extra={"format": "regex"})]
GroupSize = Literal[-1] | Annotated[int, Field(strict=True, ge=16, le=1024)]
PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
SizeText = Annotated[str, Field(examples=["5GB"])]
ByteCount = Annotated[
    int,
    Field(strict=True, ge=1),
    BeforeValidator(_size_in_bytes, json_schema_input_type=PositiveInt | SizeText),
]


class Section(BaseModel):
    """Base of all records: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


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

    method: Method = Field(
        default="gptq",
        description="rtn rounds to nearest; gptq compensates each column's error in the next; attention_aware also "
        "sees what attention makes of queries, keys and values (section attention); binary and attention_aware_binary "
        "do the same with sums of signs in place of uniform grids (section binary); gptqt is binary as published",
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


class AttentionRecipe(Section):
    """What of attention the method attention_aware sees; other methods leave it unused."""

    rows: AttentionRows = Field(
        default="softmax",
        description="how errors of query and key rows meet: off, pooled over all pairs of tokens, or as softmax "
        "weighs them",
    )
    row_windows: PositiveInt = Field(default=32, description="windows on which that is measured")
    row_order: RowOrder = Field(default="activation", description="order in which the rows of a head are quantized")
    row_block: Literal[-1] | PositiveInt = Field(
        default=1, description="rows of a head whose grids are found together; -1 for the whole head"
    )
    values: StrictBool = Field(default=True, description="value heads have input moments behind the attention map")
    value_rows: StrictBool = Field(
        default=False, description="errors of value rows meet as the output projection makes them"
    )
    value_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.25, description="share of the positions that count in the moments of values"
    )


class BinaryRecipe(Section):
    """How binary codes are found by the methods that make them; other methods leave it unused."""

    intermediate_bits: Annotated[int, Field(strict=True, ge=3, le=6)] | None = Field(
        default=None, description="width of the whole numbers among which levels are searched; null: 2 more, at most 5"
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
        default=3, strict=True, ge=0, le=100, description="rounds of fitting all coefficients and improving all codes"
    )
    coefficients: CoefficientStorage = Field(
        default="int8",
        description="how coefficients are stored: float (float16), int8 with a scale of the row, or steps: one shape "
        "for a row, a scale and an offset for each group",
    )


class TransformRecipe(Section):
    """Changes of the weights before anything is measured that leave the model's outputs as they are."""

    fold_norms: StrictBool = Field(default=False, description="norm weights go into the linears behind them")
    residual_rotation: Rotation = Field(
        default="none", description="orthogonal rotation of the residual stream; folds norms and unties the head"
    )
    value_rotation: Rotation = Field(default="none", description="orthogonal rotation of each value head")
    seed: int = Field(default=0, strict=True, ge=0, lt=2**63, description="seed of the rotations")


class NormTweakingRecipe(Section):
    """Training of the norm weights behind the quantized linears of each decoder layer: the one step with gradients."""

    steps: int = Field(default=0, strict=True, ge=0, le=100_000, description="steps per decoder layer; 0: off")
    learning_rate: float = Field(
        default=5e-3, strict=True, gt=0, le=1, description="first step, as a share of the size of each norm's weights"
    )


class CalibrationRecipe(Section):
    """Which text the model reads while it is measured."""

    source: Annotated[StrictStr, Field(min_length=1)] = Field(
        default="self",
        description="self (the model writes it), bundled:story-calibration, a .txt, .jsonl or .parquet file, "
        "a folder saved by datasets, or a hub id owner/name",
    )
    config: StrictStr | None = Field(default=None, description="configuration of a hub data set")
    split: StrictStr = Field(default="train", description="split of a saved or hub data set")
    column: StrictStr = Field(default="text", description="column that holds the text, or the chat messages")
    revision: StrictStr | None = Field(
        default=None, description="commit of a hub data set; without it the text can change"
    )
    num_windows: PositiveInt = Field(default=128, description="windows to calibrate on")
    window_size: PositiveInt | None = Field(
        default=None, description="tokens per window; null: 2048, or less if the model ends earlier"
    )
    seed: int = Field(
        default=0, strict=True, ge=0, lt=2**63, description="seed of the choice of windows and of self text"
    )
    bos: BosPolicy = Field(default="none", description="where a begin-of-sequence token is put")
    layout: WindowLayout = Field(
        default="packed", description="packed: documents joined and cut; documents: one per window"
    )
    chat_template: StrictBool = Field(
        default=False, description="the column holds chat messages for the model's template"
    )
    windows_per_batch: PositiveInt | None = Field(default=None, description="windows per forward pass; null: chosen")
    full_precision_windows: Annotated[int, Field(strict=True, ge=0)] | None = Field(
        default=None,
        description="windows also run through unquantized layers, to measure output error; null: one in 32, at least 1",
    )
    held_out_windows: PositiveInt = Field(
        default=8,
        description="windows kept out of all moments, on which the strength of the target shift is chosen "
        "and trained norms are judged",
    )
    compute_dtype: Literal["auto", "float32"] = Field(
        default="auto",
        description="dtype of activations; auto: bfloat16 where model and processor have it, else float32",
    )
    moment_dtype: FloatDtype = Field(default="float32", description="accumulator of the input moments")
    moment_stream: Literal["quantized", "full_precision"] = Field(
        default="quantized", description="activations measured"
    )
    self_temperature: float = Field(
        default=1.0, strict=True, gt=0, allow_inf_nan=False, description="sampling temperature of self text"
    )

    @model_validator(mode="after")
    def _check_self_text(self) -> Self:
        if self.source != "self":
            return self
        if self.chat_template:
            raise impossible(
                "chat_template",
                expected="false where the model writes its own text",
                found="chat_template true with source self",
                action="Name a text with chat messages in calibration.source, or set calibration.chat_template=false.",
            )
        if self.layout == "documents":
            raise impossible(
                "layout",
                expected="packed where the model writes its own text",
                found="layout documents with source self",
                action="Name a text in calibration.source, or set calibration.layout=packed.",
            )
        return self


class KVCacheRecipe(Section):
    """How keys and values are kept at run time."""

    bits: Literal[16] = Field(default=16, description="bits per cached key or value")


class ExportRecipe(Section):
    """What is written."""

    format: FormatName = Field(default="gptq", description="layout of the checkpoint")
    max_shard_bytes: ByteCount = Field(
        default=5_000_000_000, description="largest weight file; 5GB and 500MiB are understood"
    )


class Recipe(Section):
    """Everything that decides the bytes of a quantized checkpoint, but for the model and the text."""

    name: StrictStr = Field(default="", description="name of the recipe")
    description: StrictStr = Field(default="", description="one line for people")
    weights: WeightRecipe = Field(default=WeightRecipe(), description="how weights are quantized")
    attention: AttentionRecipe = Field(default=AttentionRecipe(), description="what attention_aware sees")
    binary: BinaryRecipe = Field(default=BinaryRecipe(), description="how binary codes are found")
    transform: TransformRecipe = Field(default=TransformRecipe(), description="changes before quantization")
    norm_tweaking: NormTweakingRecipe = Field(default=NormTweakingRecipe(), description="training of norm weights")
    calibration: CalibrationRecipe = Field(default=CalibrationRecipe(), description="which text is read")
    kv_cache: KVCacheRecipe = Field(default=KVCacheRecipe(), description="how keys and values are kept")
    export: ExportRecipe = Field(default=ExportRecipe(), description="what is written")

    @model_validator(mode="after")
    def _check_shift(self) -> Self:
        if self.weights.target_shift == "off":
            return self
        if not self.weights.true_sequential:
            raise impossible(
                "weights.true_sequential",
                expected="true where targets are shifted, since each stage makes up for those before it",
                found=f"false with target_shift {self.weights.target_shift}",
                action="Set weights.true_sequential=true or weights.target_shift=off.",
            )
        if self.calibration.moment_stream != "quantized":
            raise impossible(
                "calibration.moment_stream",
                expected="quantized where targets are shifted",
                found=f"{self.calibration.moment_stream} with target_shift {self.weights.target_shift}",
                action="Set calibration.moment_stream=quantized or weights.target_shift=off.",
            )
        if self.weights.target_shift == "gptaq" and not _can_be_gptaq(self.weights):
            raise impossible(
                "weights.target_shift",
                expected="exact, unless method is gptq for all linears, shift_strength is a number, nothing is "
                "refined, and dynamic groups divide 128 or are multiples of it",
                found="gptaq with other settings",
                action="Set weights.method=gptq, weights.shift_strength=0.25, weights.scale_refit=false and "
                "weights.code_sweeps=0, or weights.target_shift=exact.",
            )
        return self

    @model_validator(mode="after")
    def _check_binary(self) -> Self:
        weights = self.weights
        rules = [("", weights.method, weights.bits)]
        rules += [
            (f"rules.{index}.", rule.method or weights.method, rule.bits or weights.bits)
            for index, rule in enumerate(weights.rules)
        ]
        for place, method, bits in rules:
            if method not in BINARY_METHODS:
                continue
            intermediate = self.binary.intermediate_bits
            if bits > 4 or (intermediate is not None and intermediate <= bits):
                raise impossible(
                    f"weights.{place}bits",
                    expected="2, 3 or 4, and fewer than binary.intermediate_bits, where codes are sums of signs",
                    found=f"{bits} with method {method} and intermediate_bits {intermediate}",
                    action="Choose fewer bits or another method, or leave binary.intermediate_bits out.",
                )
            if weights.scale_refit or weights.code_sweeps:
                raise impossible(
                    "weights.scale_refit" if weights.scale_refit else "weights.code_sweeps",
                    expected="nothing where codes are sums of signs, which are refined by binary.sweeps",
                    found=f"it beside method {method}",
                    action="Set weights.scale_refit=false and weights.code_sweeps=0, and choose binary.sweeps.",
                )
            if weights.group_grids == "static":
                raise impossible(
                    "weights.group_grids",
                    expected="dynamic where codes are sums of signs",
                    found=f"static with method {method}",
                    action="Set weights.group_grids=dynamic.",
                )
        return self


def _can_be_gptaq(weights: WeightRecipe) -> bool:
    """Say whether the published rule is defined for these settings; its blocks have 128 columns."""
    methods = {weights.method, *(rule.method for rule in weights.rules if rule.method is not None)}
    sizes = [weights.group_size, *(rule.group_size for rule in weights.rules if rule.group_size is not None)]
    nests = all(size == -1 or 128 % size == 0 or size % 128 == 0 for size in sizes)
    refined = weights.scale_refit or weights.code_sweeps > 0
    return (
        methods == {"gptq"}
        and weights.shift_strength != "held_out"
        and not refined
        and (nests or weights.group_grids == "static")
    )
