"""The configuration object of sign planes, version 1: docs/formats/planes.md is its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import FormatError, TargetError
from optgptq.formats.consumers import PLANE_BITS
from optgptq.layout import CoefficientStorage, LinearLayout
from optgptq.packing.planes import COLUMNS_PER_WORD

QUANT_METHOD = "optgptq"
VERSION = 1
# What every file of this version says in the same words.
FIXED: Mapping[str, Any] = {
    "quant_method": QUANT_METHOD,
    "format": "bcq",
    "version": VERSION,
    "code": "pm1",
    "packing": "k32",
}
SETTINGS = ("bits", "group_size", "coefficients")
KEYS = (*FIXED, *SETTINGS, "linears", "dense")
LINEAR_KEYS = (*SETTINGS, "in_features")


@dataclass(frozen=True, slots=True, order=True)
class PlaneSettings:
    """What can differ from linear to linear; `in_features` is None where it is a whole number of words."""

    bits: int
    group_size: int
    coefficients: CoefficientStorage
    in_features: int | None = None


@dataclass(frozen=True, slots=True)
class PlanesConfig:
    """A configuration as read: settings of most linears, of those that differ, and names that stay dense."""

    base: PlaneSettings
    linears: Mapping[str, PlaneSettings]
    dense: tuple[str, ...]

    def settings_for(self, name: str) -> PlaneSettings:
        """Return the settings of linear `name`."""
        return self.linears.get(name, self.base)


def planes_config(layouts: Sequence[LinearLayout]) -> dict[str, Any]:
    """Return the configuration for `layouts`: the commonest settings, and those of the linears that differ."""
    quantized = {layout.name: _settings_of(layout) for layout in layouts if layout.bits is not None}
    if not quantized:
        raise TargetError(
            QUANT_METHOD,
            expected="at least one quantized linear",
            found="none",
            action="Change the rules of the recipe so that something is quantized.",
        )
    counts = Counter(replace(settings, in_features=None) for settings in quantized.values())
    base = max(counts, key=lambda choice: (counts[choice], choice))
    linears = {name: _differences(quantized[name], base) for name in sorted(quantized) if quantized[name] != base}
    return {
        **FIXED,
        "bits": base.bits,
        "group_size": base.group_size,
        "coefficients": base.coefficients,
        **({"linears": linears} if linears else {}),
        "dense": sorted(layout.name for layout in layouts if layout.bits is None),
    }


def read_planes_config(folder: CheckpointFolder) -> PlanesConfig:
    """Return the configuration in config.json; FormatError for another version, or a key or value not of this one."""
    where = f"{folder.path}, quantization_config"
    content = folder.config.get("quantization_config")
    if not isinstance(content, dict):
        raise _bad(where, "an object", content)
    # First: another version may have any other keys.
    if content.get("version") != VERSION or isinstance(content.get("version"), bool):
        raise FormatError(
            f"{where}.version",
            expected=str(VERSION),
            found=repr(content.get("version"))[:200],
            action="Read the checkpoint with the version of optgptq that made it, or with a newer one.",
        )
    for key, value in FIXED.items():
        if content.get(key) != value:
            raise _bad(f"{where}.{key}", repr(value), content.get(key))
    _require_known(content, KEYS, where)
    base = _read_settings({key: content.get(key) for key in SETTINGS}, where)
    linears, dense = content.get("linears", {}), content.get("dense", [])
    if not isinstance(linears, dict) or not all(isinstance(entry, dict) for entry in linears.values()):
        raise _bad(f"{where}.linears", "a table from names of linears to their settings", linears)
    if not isinstance(dense, list) or not all(isinstance(name, str) for name in dense):
        raise _bad(f"{where}.dense", "a list of names of linears", dense)
    return PlanesConfig(
        base=base,
        linears={name: _read_linear(entry, base, f"{where}.linears.{name}") for name, entry in linears.items()},
        dense=tuple(dense),
    )


def _read_linear(entry: Mapping[str, Any], base: PlaneSettings, where: str) -> PlaneSettings:
    _require_known(entry, LINEAR_KEYS, where)
    common = {"bits": base.bits, "group_size": base.group_size, "coefficients": base.coefficients}
    return _read_settings({**common, **entry}, where)


def _read_settings(content: Mapping[str, Any], where: str) -> PlaneSettings:
    bits, group_size, storage = content["bits"], content["group_size"], content["coefficients"]
    in_features = content.get("in_features")
    if type(bits) is not int or bits not in PLANE_BITS:
        raise _bad(f"{where}.bits", f"{PLANE_BITS[0]} to {PLANE_BITS[-1]}", bits)
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise _bad(f"{where}.group_size", "-1 or a positive integer", group_size)
    if storage not in get_args(CoefficientStorage):
        raise _bad(f"{where}.coefficients", f"one of {', '.join(get_args(CoefficientStorage))}", storage)
    if "in_features" in content and (type(in_features) is not int or in_features < 1):
        raise _bad(f"{where}.in_features", "a positive integer", in_features)
    return PlaneSettings(bits, group_size, cast(CoefficientStorage, storage), in_features)


def _settings_of(layout: LinearLayout) -> PlaneSettings:
    assert layout.bits is not None
    assert layout.coefficients is not None
    padded = layout.in_features % COLUMNS_PER_WORD != 0
    return PlaneSettings(layout.bits, layout.group_size, layout.coefficients, layout.in_features if padded else None)


def _differences(settings: PlaneSettings, base: PlaneSettings) -> dict[str, Any]:
    pairs = (
        ("bits", settings.bits, base.bits),
        ("group_size", settings.group_size, base.group_size),
        ("coefficients", settings.coefficients, base.coefficients),
        ("in_features", settings.in_features, None),
    )
    return {key: mine for key, mine, common in pairs if mine != common}


def _require_known(content: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    unknown = sorted(content.keys() - set(keys))
    if unknown:
        raise _bad(where, f"keys among {', '.join(keys)}", ", ".join(unknown))


def _bad(where: str, expected: str, found: object) -> FormatError:
    return FormatError(
        where,
        expected=expected,
        found=(found if isinstance(found, str) else repr(found))[:200],
        action="Get the checkpoint again, or correct its configuration (docs/formats/planes.md).",
    )
