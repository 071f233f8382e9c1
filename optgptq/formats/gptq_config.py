"""The configuration object of GPTQ files; foreign field names (`sym`, `desc_act`, ...) live only here.

Source: GPTQModel 7.7's `quantize_config.json`, and what vLLM 0.33, SGLang 0.5 and transformers 5.23 demand of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optgptq import __version__
from optgptq.checkpoint.folder import CheckpointFolder, read_json_object
from optgptq.errors import FormatError, TargetError
from optgptq.formats.naming import engine_names, exact_patterns, is_outer, matches
from optgptq.layout import LinearLayout

QUANTIZE_CONFIG_FILE = "quantize_config.json"
VERSIONS = {"gptq": 1, "gptq_v2": 2}
BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True, order=True)
class GptqSettings:
    """What can differ from linear to linear."""

    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True, slots=True)
class GptqConfig:
    """A configuration as read: settings for most linears, and rules in the order in which the first match counts."""

    version: int
    base: GptqSettings
    rules: tuple[tuple[str, Mapping[str, Any]], ...]

    def settings_for(self, name: str) -> GptqSettings:
        """Return the settings of linear `name`."""
        for pattern, overrides in self.rules:
            if matches(pattern, name, where=f"quantization_config.dynamic, rule {pattern[:80]!r}"):
                return _settings({**_spelled(self.base), **overrides})
        return self.base


def gptq_config(layouts: Sequence[LinearLayout], *, label: str) -> dict[str, Any]:
    """Return the configuration for `layouts`: the commonest settings, and rules for the linears that differ."""
    settings = {layout.name: _settings_of(layout) for layout in layouts if layout.bits is not None}
    if not settings:
        raise TargetError(
            label,
            expected="at least one quantized linear",
            found="none",
            action="Change the rules of the recipe so that something is quantized.",
        )
    counts = Counter(settings.values())
    base = max(counts, key=lambda choice: (counts[choice], choice))
    config: dict[str, Any] = {
        "quant_method": "gptq",
        **_spelled(base),
        "desc_act": False,
        "checkpoint_format": label,
        "format": label,
        "lm_head": any(is_outer(name) for name in settings),
        "pack_dtype": "int32",
    }
    rules = _rules(layouts, base)
    if rules:
        config["dynamic"] = rules
    config["meta"] = {"quantizer": [f"optgptq:{__version__}"]}
    return config


def read_gptq_config(folder: CheckpointFolder) -> GptqConfig:
    """Return the configuration of a GPTQ checkpoint, from config.json or from `quantize_config.json`.

    Raises:
        FormatError: a key is missing or has a value that is not read here.
    """
    content = folder.config.get("quantization_config")
    if content is None:
        content = read_json_object(folder.path, QUANTIZE_CONFIG_FILE)
    where = f"{folder.path}, quantization_config"
    label = _label(content)
    _require(label in VERSIONS, where, "checkpoint_format", f"one of {', '.join(VERSIONS)}", label)
    pack_dtype = content.get("pack_dtype", "int32")
    _require(pack_dtype == "int32", where, "pack_dtype", "int32", pack_dtype)
    for key, kind in (("bits", int), ("group_size", int)):
        _require(type(content.get(key)) is kind, where, key, "an integer", content.get(key))
    rules = content.get("dynamic") or {}
    valid = isinstance(rules, dict) and all(isinstance(value, dict | None) for value in rules.values())
    _require(valid, where, "dynamic", "a table from patterns to overrides", rules)
    return GptqConfig(
        version=VERSIONS[label],
        base=_settings(content, where=where),
        rules=tuple(
            (pattern.removeprefix("+:"), overrides or {})
            for pattern, overrides in rules.items()
            if not pattern.startswith("-:")
        ),
    )


def gptq_label(config: Mapping[str, Any]) -> str:
    """Return the label of a configuration object: `gptq` where there is none."""
    return _label(config)


def _label(config: Mapping[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()


def _settings(content: Mapping[str, Any], *, where: str = "quantization_config.dynamic") -> GptqSettings:
    bits, group_size = content["bits"], content["group_size"]
    _require(bits in BITS, where, "bits", f"one of {', '.join(map(str, BITS))}", bits)
    good_group = type(group_size) is int and (group_size == -1 or group_size > 0)
    _require(good_group, where, "group_size", "-1 or a positive integer", group_size)
    symmetric = content.get("sym", True)
    _require(isinstance(symmetric, bool), where, "sym", "true or false", symmetric)
    return GptqSettings(bits, group_size, symmetric)


def _settings_of(layout: LinearLayout) -> GptqSettings:
    return GptqSettings(layout.bits or 0, layout.group_size, layout.symmetric)


def _spelled(settings: GptqSettings) -> dict[str, Any]:
    return {"bits": settings.bits, "group_size": settings.group_size, "sym": settings.symmetric}


def _rules(layouts: Sequence[LinearLayout], base: GptqSettings) -> dict[str, dict[str, Any]]:
    """Rules for dense linears and for those with other settings; engines match them against fused names as well."""
    rules: dict[str, dict[str, Any]] = {}
    dense = [layout for layout in layouts if layout.bits is None and layout.name != "lm_head"]
    for pattern in exact_patterns(engine_names(dense)):
        rules[f"-:{pattern}"] = {}
    quantized = [layout for layout in layouts if layout.bits is not None]
    for settings in sorted({_settings_of(layout) for layout in quantized} - {base}):
        members = [layout for layout in quantized if _settings_of(layout) == settings]
        for pattern in exact_patterns(engine_names(members)):
            rules[f"+:{pattern}"] = _spelled(settings)
    return rules


def _require(good: bool, where: str, key: str, expected: str, found: object) -> None:
    if not good:
        raise FormatError(
            f"{where}.{key}",
            expected=expected,
            found=repr(found)[:200],
            action="Convert the checkpoint with the tool that made it, or correct its configuration.",
        )
