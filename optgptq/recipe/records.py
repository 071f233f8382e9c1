"""The recipe: frozen records, validated when they are built.

Field descriptions are what `optgptq recipes --schema` prints. Combinations that no run can obey are refused here; what
depends on the model (rules that match nothing, groups that do not divide) is checked where the model is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, StrictStr, model_validator

from optgptq.recipe.calibration import CalibrationRecipe
from optgptq.recipe.gates import GatesRecipe
from optgptq.recipe.gqa import GQARecipe
from optgptq.recipe.head import DETAILS, HeadRecipe, require_possible
from optgptq.recipe.kv_cache import KVCacheRecipe
from optgptq.recipe.section import ByteCount, PositiveInt, Section, impossible
from optgptq.recipe.weights import BINARY_METHODS, BinaryRecipe, WeightRecipe, WeightRule

AttentionRows = Literal["off", "pooled", "softmax"]
RowOrder = Literal["natural", "activation"]
Rotation = Literal["none", "hadamard", "random"]
# What means something on uniform grids alone.
UNIFORM_ONLY = ("symmetric", "grid_search", "scale_refit", "code_sweeps", "group_grids")
FormatName = Literal["gptq", "gptq_v2", "compressed-tensors", "optgptq"]


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
        default=True, description="with `values`: errors of value rows meet as the output projection makes them"
    )
    value_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.25, description="share of the positions that count in the moments of values"
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


class ExportRecipe(Section):
    """What is written."""

    format: FormatName = Field(default="gptq", description="layout of the checkpoint")
    max_shard_bytes: ByteCount = Field(
        default=5_000_000_000, description="largest weight file; 5GB and 500MiB are understood"
    )


class Recipe(Section):
    """Everything that decides the bytes of a quantized checkpoint, but for the model and the text; and its gates."""

    name: StrictStr = Field(default="", description="name of the recipe")
    description: StrictStr = Field(default="", description="one line for people")
    weights: WeightRecipe = Field(default=WeightRecipe(), description="how weights are quantized")
    attention: AttentionRecipe = Field(default=AttentionRecipe(), description="what attention_aware sees")
    binary: BinaryRecipe = Field(default=BinaryRecipe(), description="how binary codes are found")
    head: HeadRecipe = Field(default=HeadRecipe(), description="how the output head is quantized")
    gqa: GQARecipe = Field(default=GQARecipe(), description="key/value heads merged before quantization")
    transform: TransformRecipe = Field(default=TransformRecipe(), description="changes before quantization")
    norm_tweaking: NormTweakingRecipe = Field(default=NormTweakingRecipe(), description="training of norm weights")
    calibration: CalibrationRecipe = Field(default=CalibrationRecipe(), description="which text is read")
    kv_cache: KVCacheRecipe = Field(default=KVCacheRecipe(), description="how keys and values are kept")
    export: ExportRecipe = Field(default=ExportRecipe(), description="what is written")
    gates: GatesRecipe = Field(default=GatesRecipe(), description="what the finished checkpoint must keep")

    @model_validator(mode="after")
    def _check_dense_weights(self) -> Self:
        if self.weights.method != "none":
            return self
        why = "where weights stay as they are (weights.method none)"
        fields = [field for field in WeightRecipe.model_fields if field != "method"]
        _require_defaults("weights", self.weights, fields, why=why)
        _require_defaults("norm_tweaking", self.norm_tweaking, ("steps",), why=why)
        _require_defaults("export", self.export, ("format",), why=why)
        _require_defaults("head", self.head, ("bits",), why=why)
        if not self.kv_cache.is_quantized and self.gqa.group == 1 and self.transform == TransformRecipe():
            raise impossible(
                "weights.method",
                expected="a method, or none together with a quantized KV cache, grouped heads or a transform",
                found="none, and nothing else is asked",
                action="Set kv_cache.bits=4, or choose a method.",
            )
        return self

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        if not self.head.is_quantized:
            _require_defaults("head", self.head, DETAILS, why="where the head stays as it is (head.bits null)")
        else:
            require_possible(self.head, self.weights, export_format=self.export.format)
        return self

    @model_validator(mode="after")
    def _check_fp8_scales(self) -> Self:
        if self.kv_cache.fp8_scales != "off" and self.weights.method == "none":
            raise impossible(
                "kv_cache.fp8_scales",
                expected="off where weights stay as they are (weights.method none): readers look for them in "
                "compressed-tensors checkpoints alone",
                found=f"{self.kv_cache.fp8_scales} with weights.method none",
                action="Set kv_cache.fp8_scales=off, or choose a weights.method and export.format=compressed-tensors.",
            )
        if self.kv_cache.fp8_scales != "off" and self.export.format != "compressed-tensors":
            raise impossible(
                "kv_cache.fp8_scales",
                expected="off, unless export.format is compressed-tensors, the one layout whose readers look for them",
                found=f"{self.kv_cache.fp8_scales} with export.format {self.export.format}",
                action="Set export.format=compressed-tensors or kv_cache.fp8_scales=off.",
            )
        return self

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
        weights, intermediate = self.weights, self.binary.intermediate_bits
        asked = [("bits", weights.method, weights.bits)]
        for index, rule in enumerate(weights.rules):
            asked.append((f"rules.{index}.bits", rule.method or weights.method, rule.bits or weights.bits))
        binary = [(field, bits) for field, method, bits in asked if method in BINARY_METHODS]
        for field, bits in binary:
            if bits > 4 or (intermediate is not None and intermediate <= bits):
                raise impossible(
                    f"weights.{field}",
                    expected="2, 3 or 4, and fewer than binary.intermediate_bits, where codes are sums of signs",
                    found=f"{bits} bits with intermediate_bits {intermediate}",
                    action="Choose fewer bits or another method, or leave binary.intermediate_bits out.",
                )
        if binary:
            _require_defaults("weights", weights, UNIFORM_ONLY, why="where codes are sums of signs (section binary)")
            _check_rules_of_signs(weights)
        if {method for _, method, _ in asked} & BINARY_METHODS == {"gptqt"}:
            fields = [field for field in BinaryRecipe.model_fields if field != "intermediate_bits"]
            _require_defaults("binary", self.binary, fields, why="for GPTQT as published")
        return self


def _require_defaults(section: str, values: Section, fields: Iterable[str], *, why: str) -> None:
    """Raise where a field that the methods do not look at was changed."""
    for field in fields:
        expected, found = type(values).model_fields[field].default, getattr(values, field)
        if found != expected:
            raise impossible(
                f"{section}.{field}",
                expected=f"{expected} {why}",
                found=f"{found}",
                action=f"Leave {section}.{field} out, or choose another weights.method.",
            )


def _check_rules_of_signs(weights: WeightRecipe) -> None:
    """Raise where a rule whose own method, or else the section's, makes sums of signs names what only grids have.

    Such a field is refused at its default too: in a rule it is either named or left out.
    """
    fields = [field for field in UNIFORM_ONLY if field in WeightRule.model_fields]
    for index, rule in enumerate(weights.rules):
        method = rule.method or weights.method
        for field in fields:
            found = getattr(rule, field)
            if method in BINARY_METHODS and found is not None:
                where = f"rules.{index}"
                raise impossible(
                    f"weights.{where}.{field}",
                    expected=f"no {field} in a rule of method {method}, whose codes are sums of signs (section binary)",
                    found=f"{found} in the rule for {rule.match!r}",
                    action=f"Leave weights.{where}.{field} out, or set weights.{where}.method to one of uniform grids.",
                )


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
