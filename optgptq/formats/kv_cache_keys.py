"""The object `kv_cache_quantization` of config.json, read strictly: what it says and nobody here implements is refused.

Format: `docs/formats/kv-cache.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optgptq.errors import FormatError, UsageError
from optgptq.formats.kv_cache_fields import Fields
from optgptq.kv_cache.page_layout import PAGE_MULTIPLE, require_head_size
from optgptq.kv_cache.scheme import (
    CODE_BITS,
    EXACT_BITS,
    Axis,
    CacheScheme,
    LayerScheme,
    PastRule,
    SideScheme,
    granule_of,
    parse_past_mode,
)

CACHE_KEY = "kv_cache_quantization"
VERSION = 1
PARAMS_FILE = "kv_cache/kv_params.safetensors"
TRANSFORMS = ("none", "shift_scale", "hadamard", "matrix")
# Fields whose only value this version knows, with that value.
FIXED_LAYER: Mapping[str, str] = {"param_dtype": "float16", "rope_stage": "post"}
AXES: tuple[Axis, ...] = ("channel", "token")
FIXED_SIDE: Mapping[str, str | bool] = {"symmetric": False, "grid": "uniform", "zero": "float_min"}
_SIDES = ("k", "v")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKeys:
    """What config.json says of one decoder layer.

    Attributes:
        scheme: bits and groups.
        transforms: names of the transforms of keys and of values, of `TRANSFORMS`.
        clips: ratio of the range of keys and of values where the parameters hold no ranges.
        is_skipped: listed in `skip_layers`: nothing of it is quantized, and no parameters are used.
    """

    scheme: LayerScheme
    transforms: tuple[str, str]
    clips: tuple[float, float] = (1.0, 1.0)
    is_skipped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKeys:
    """The whole object.

    Attributes:
        layers: one record per decoder layer.
        past: which keys are read exactly.
        params_file, params_sha256: the file of parameters, relative to the folder, and its SHA-256 in hexadecimal.
        folded: what was moved into the weights, for people.
        calibration: where the parameters come from, for people.
    """

    layers: tuple[LayerKeys, ...]
    past: PastRule
    params_file: str
    params_sha256: str
    folded: Mapping[str, Any]
    calibration: Mapping[str, Any]

    @property
    def scheme(self) -> CacheScheme:
        """The scheme of the cache."""
        return CacheScheme(layers=tuple(layer.scheme for layer in self.layers), past=self.past)


def params_place(content: object, *, where: str) -> tuple[str, str]:
    """Return name and SHA-256 of the file of parameters that the object names, version checked.

    Raises:
        FormatError: another version, or names that are none.
    """
    fields = Fields(content, where)
    _require_version(fields)
    name, digest = fields.text("params_file"), fields.text("params_sha256")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise fields.refusal("params_sha256", digest, expected="a SHA-256 of 64 hexadecimal digits in lower case")
    return name, digest


def parse_cache_keys(content: object, *, where: str, num_layers: int, head_dim: int) -> CacheKeys:
    """Return what the object `content` says about a model of `num_layers` decoder layers.

    Raises:
        FormatError: another version, a method that is not known, or values that contradict the model or each other.
    """
    params_file, params_sha256 = params_place(content, where=where)
    fields = Fields(content, where)
    fields.ignore("version", "params_file", "params_sha256")
    default = fields.section("default").content
    overrides = _overrides(fields, num_layers)
    skipped = _skipped(fields, num_layers)
    plain = _layer(Fields(default, f"{where}.default"), head_dim)
    layers = []
    for index in range(num_layers):
        if index in skipped:
            exact = LayerScheme(keys=SideScheme(), values=SideScheme())
            layers.append(LayerKeys(scheme=exact, transforms=("none", "none"), is_skipped=True))
        elif index in overrides:
            own = Fields(_merged(default, overrides[index]), f"{where}.layers.{index}")
            layers.append(_layer(own, head_dim))
        else:
            layers.append(plain)
    past = _past(fields, layers)
    fields.fixed("packing", "split")
    keys = CacheKeys(
        layers=tuple(layers),
        past=past,
        params_file=params_file,
        params_sha256=params_sha256,
        folded=fields.table("folded"),
        calibration=fields.table("calibration"),
    )
    fields.finish()
    return keys


def _require_version(fields: Fields) -> None:
    version = fields.raw("version")
    if version == VERSION and not isinstance(version, bool):
        return
    newer = isinstance(version, int) and version > VERSION
    raise FormatError(
        f"{fields.where}.version",
        expected=f"{VERSION}, the only version that is supported",
        found=f"{version}, a newer version" if newer else repr(version),
        action="Use a newer optgptq for this checkpoint, or --kv-cache 16 to leave its cache unquantized.",
    )


def _overrides(fields: Fields, num_layers: int) -> dict[int, Mapping[str, Any]]:
    overrides = {}
    table = fields.table("layers")
    section = Fields(table, f"{fields.where}.layers")
    for name in table:
        index = int(name) if name.isascii() and name.isdecimal() else -1
        if not 0 <= index < num_layers or str(index) != name:
            raise section.refusal(name, name, expected=f"the number of a decoder layer, 0 to {num_layers - 1}")
        overrides[index] = section.section(name).content
    return overrides


def _merged(default: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return `default` with what `own` says, sides field by field."""
    merged = {**default, **own}
    for side in _SIDES:
        if isinstance(default.get(side), Mapping) and isinstance(own.get(side), Mapping):
            merged[side] = {**default[side], **own[side]}
    return merged


def _skipped(fields: Fields, num_layers: int) -> list[int]:
    listed = fields.raw("skip_layers")
    listed = [] if listed is None else listed
    numbers = isinstance(listed, list) and all(
        isinstance(index, int) and not isinstance(index, bool) and 0 <= index < num_layers for index in listed
    )
    if not numbers:
        raise fields.refusal("skip_layers", listed, expected=f"a list of decoder layers, 0 to {num_layers - 1}")
    return list(listed)


def _layer(fields: Fields, head_dim: int) -> LayerKeys:
    keys, key_clip = _side(fields.section("k"), head_dim, takes_tokens=True)
    values, value_clip = _side(fields.section("v"), head_dim, takes_tokens=False)
    key_transform, value_transform = (fields.choice(f"{side}_transform", TRANSFORMS, default="none") for side in _SIDES)
    for field, value in FIXED_LAYER.items():
        fields.choice(field, (value,), default=value)
    fields.finish()
    return LayerKeys(
        scheme=LayerScheme(keys=keys, values=values),
        transforms=(key_transform, value_transform),
        clips=(key_clip, value_clip),
    )


def _side(fields: Fields, head_dim: int, *, takes_tokens: bool) -> tuple[SideScheme, float]:
    bits = fields.integer("bits", default=None, minimum=1)
    if bits not in (*CODE_BITS, EXACT_BITS):
        expected = "one of " + ", ".join(str(known) for known in (*CODE_BITS, EXACT_BITS))
        raise fields.refusal("bits", bits, expected=expected)
    for field, value in FIXED_SIDE.items():
        fields.fixed(field, value)
    axis = fields.choice("axis", AXES, default="channel")
    clip = fields.number("clip", default=1.0)
    if not 0 < clip <= 1:
        raise fields.refusal("clip", clip, expected="a share of the range, above 0 and at most 1")
    size = fields.integer("group_size", default=-1, minimum=-1)
    fields.finish()
    if bits == EXACT_BITS:
        return SideScheme(), clip
    action = "Pass --kv-cache 16 to leave the cache of this checkpoint unquantized."
    require_head_size(head_dim, error=FormatError, where=f"{fields.where}.bits", action=action)
    if axis == "token" and not takes_tokens:
        raise fields.refusal("axis", axis, expected="'channel' for values: groups along tokens are for keys")
    return SideScheme(bits=bits, group_size=_group_size(fields, size, axis, head_dim), axis=axis), clip


def _group_size(fields: Fields, size: int, axis: str, head_dim: int) -> int:
    if axis == "token":
        if size < 1:
            raise fields.refusal("group_size", size, expected="a number of tokens for groups along tokens")
        return size
    if size == -1:
        return head_dim
    if size < 1 or head_dim % size:
        expected = f"a divisor of the {head_dim} channels of a head, or -1 for all of them"
        raise fields.refusal("group_size", size, expected=expected)
    return size


def _past(fields: Fields, layers: Sequence[LayerKeys]) -> PastRule:
    text = fields.text("past_only", default="chunk")
    try:
        mode, window = parse_past_mode(text)
    except UsageError as error:
        raise fields.refusal("past_only", text, expected=error.expected) from error
    granule = granule_of([layer.scheme for layer in layers])
    multiple = fields.integer("page_tokens_multiple", default=math.lcm(PAGE_MULTIPLE, granule), minimum=1)
    if multiple % granule:
        raise fields.refusal(
            "page_tokens_multiple", multiple, expected=f"a multiple of the {granule} tokens that become codes together"
        )
    return PastRule(
        mode=mode,
        window=window,
        sink_tokens=fields.integer("sink_tokens", default=0, minimum=0),
        recent_tokens=fields.integer("recent_tokens", default=0, minimum=0),
        granule=granule,
    )
