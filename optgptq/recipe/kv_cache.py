"""The section of a recipe about keys and values at run time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from optgptq.recipe.section import GroupSize, PositiveInt, Section, impossible

CacheBits = Literal[16, 8, 4, 3, 2]
CacheTransform = Literal["auto", "none", "shift_scale", "hadamard", "covariance"]
EXACT_BITS = 16
# What only a calibration finds.
_DATA_FREE_TRANSFORMS = ("auto", "none", "hadamard")


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


LayerNumbers = Annotated[
    str,
    BeforeValidator(_number_as_text, json_schema_input_type=str),
    Field(
        strict=True,
        pattern=r"^[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*$",
        title="decoder layers",
        examples=["0-3,7"],
    ),
]
WindowMode = Annotated[
    str, Field(strict=True, pattern=r"^window:[1-9][0-9]{0,8}$", title="a window", examples=["window:64"])
]
PastOnly = Literal["off", "token", "chunk"] | WindowMode


class KVCacheRule(Section):
    """What differs for some decoder layers. Fields left out keep the value they have without it."""

    layers: LayerNumbers = Field(description="decoder layers from 0: numbers and ranges, such as 0-3,7")
    key_bits: CacheBits | None = Field(default=None, description="bits per key code of these layers")
    value_bits: CacheBits | None = Field(default=None, description="bits per value code of these layers")


class KVCacheRecipe(Section):
    """How keys and values are kept at run time."""

    bits: CacheBits = Field(
        default=16, description="bits per code of a cached key or value; 16 keeps them as they are computed"
    )
    key_bits: CacheBits | None = Field(default=None, description="bits per key code; null: bits")
    value_bits: CacheBits | None = Field(default=None, description="bits per value code; null: bits")
    group_size: GroupSize = Field(
        default=-1, description="channels of a head that share a scale and a minimum; -1 for the whole head"
    )
    key_axis: Literal["channel", "token"] = Field(
        default="channel",
        description="along which numbers of a key share a scale: channels of a token, or tokens of a channel (KIVI)",
    )
    key_group_tokens: Literal[16, 32, 64, 128] = Field(
        default=32, description="tokens that share a scale where key_axis is token"
    )
    sink_tokens: Annotated[int, Field(strict=True, ge=0, le=4096)] | None = Field(
        default=None,
        description="first tokens of a text that are kept in 16 bits; null: 0, 4 or 64 for at least 8, 3 or 2 bits",
    )
    recent_tokens: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] | None = Field(
        default=None,
        description="last tokens that are read in 16 bits; null: 0, 16, 32 or 128 for at least 8, 4, 3 or 2 bits",
    )
    past_only: PastOnly = Field(
        default="chunk",
        description="which keys a query reads in 16 bits: none (off), its own (token), those of its step (chunk), "
        "those from the last multiple of N on (window:N)",
    )
    calibrated: StrictBool = Field(
        default=True, description="parameters are found on the calibration text; false: a Hadamard rotation, no text"
    )
    key_transform: CacheTransform = Field(
        default="auto", description="what is done to keys before they become codes; auto: what loses least"
    )
    value_transform: CacheTransform = Field(default="auto", description="the same of values")
    rounding: Literal["fitted", "nearest"] | None = Field(
        default=None,
        description="fitted: codes of a vector make up for each other's errors; nearest: each number for itself; null: "
        "fitted where calibrated",
    )
    budget_bits: Annotated[float, Field(strict=True, ge=2, le=8, allow_inf_nan=False)] | None = Field(
        default=None,
        description="mean bits of a code that layers, keys and values share out among themselves; null: all have bits",
    )
    layers: tuple[KVCacheRule, ...] = Field(
        default=(), description="layers with bits of their own, applied in order; the last that names a layer wins"
    )
    skip_layers: LayerNumbers | None = Field(
        default=None, description="decoder layers that keep 16 bits, whatever else is said of them"
    )
    num_windows: PositiveInt = Field(default=16, description="calibration windows that are read for the cache")
    fold: StrictBool = Field(
        default=False, description="scales go into the weights before these are quantized, where that changes nothing"
    )
    refine: Literal["off", "gradient"] = Field(
        default="off", description="shift and scale are also moved by gradients, where held-out windows approve"
    )
    fp8_scales: Literal["off", "tensor", "head"] = Field(
        default="off",
        description="scales of an 8-bit float cache for other engines, for each layer or head; compressed-tensors only",
    )

    @property
    def is_quantized(self) -> bool:
        """Some layer has codes; else every other field but `fp8_scales` means nothing."""
        return self.smallest_bits < EXACT_BITS

    @property
    def smallest_bits(self) -> int:
        """Return the fewest bits that a side of a layer is asked to have."""
        asked = [*self._sides(), *(bits for rule in self.layers for bits in (rule.key_bits, rule.value_bits))]
        return min(bits for bits in asked if bits is not None)

    def _sides(self) -> tuple[int, int]:
        return self.key_bits or self.bits, self.value_bits or self.bits

    @model_validator(mode="after")
    def _check_data_free(self) -> Self:
        if self.calibrated or not self.is_quantized:
            return self
        for field, allowed in (
            ("key_transform", _DATA_FREE_TRANSFORMS),
            ("value_transform", _DATA_FREE_TRANSFORMS),
            ("rounding", (None, "nearest")),
            ("budget_bits", (None,)),
            ("fold", (False,)),
            ("refine", ("off",)),
        ):
            found = getattr(self, field)
            if found not in allowed:
                raise impossible(
                    field,
                    expected=f"{_any_of(allowed)} where nothing is calibrated",
                    found=f"{_shown(found)} with calibrated false",
                    action=f"Leave kv_cache.{field} out, or set kv_cache.calibrated=true.",
                )
        return self

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.key_axis == "token" and self.rounding == "fitted":
            raise impossible(
                "rounding",
                expected="null or nearest where keys share a scale along tokens, which are not fitted",
                found="fitted with key_axis token",
                action="Leave kv_cache.rounding out (values are then fitted all the same), or set "
                "kv_cache.key_axis=channel.",
            )
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        named = [(f"layers.{index}.layers", rule.layers) for index, rule in enumerate(self.layers)]
        named += [] if self.skip_layers is None else [("skip_layers", self.skip_layers)]
        for field, text in named:
            for first, last in layer_ranges(text):
                if first > last:
                    raise impossible(
                        field,
                        expected="ranges that go up",
                        found=f"{first}-{last}",
                        action=f"Write {last}-{first}.",
                    )
        return self


def layer_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """Return first and last layer of each part of a list such as `0-3,7`."""
    ends = (part.partition("-") for part in text.split(","))
    return tuple((int(first), int(last or first)) for first, _, last in ends)


def _any_of(values: Iterable[object]) -> str:
    return " or ".join(_shown(value) for value in values)


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else f"{value}"
