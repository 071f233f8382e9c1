"""The configuration object of compressed-tensors files; foreign field names live here and nowhere else.

Source: compressed-tensors 0.17 to 0.20 (`QuantizationConfig`), which refuses unknown keys inside a scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import FormatError, TargetError
from optgptq.formats.naming import engine_names, exact_patterns, is_outer, matches
from optgptq.layout import LinearLayout

PACKED = "pack-quantized"
# The release whose dense packing is written; readers only show it.
LAYOUT_VERSION = "0.19.0"
REGEX = "re:"
STRATEGIES = ("group", "channel")


@dataclass(frozen=True, slots=True, order=True)
class Scheme:
    """How the linears of one config group are stored."""

    bits: int
    group_size: int
    symmetric: bool


def compressed_tensors_config(layouts: Sequence[LinearLayout]) -> dict[str, Any]:
    """Return the configuration for `layouts`: one group for the whole model, or exact targets where linears differ."""
    quantized = [layout for layout in layouts if layout.bits is not None]
    if not quantized:
        raise TargetError(
            "compressed-tensors",
            expected="at least one quantized linear",
            found="none",
            action="Change the rules of the recipe so that something is quantized.",
        )
    schemes = sorted({_scheme_of(layout) for layout in quantized})
    groups = {}
    for number, scheme in enumerate(schemes):
        members = [layout for layout in quantized if _scheme_of(layout) == scheme]
        patterns = exact_patterns(engine_names(members))
        targets = [f"{REGEX}{pattern}" for pattern in patterns]
        if len(schemes) == 1:
            # Engines build heads of a class of their own, so that these are named beside the class.
            heads = exact_patterns(layout.name for layout in members if is_outer(layout.name))
            targets = ["Linear", *(f"{REGEX}{pattern}" for pattern in heads)]
        groups[f"group_{number}"] = _group(scheme, targets)
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(
            ({"lm_head"} | {layout.name for layout in layouts if layout.bits is None})
            - {layout.name for layout in quantized}
        ),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": LAYOUT_VERSION,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size == -1 else "group",
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": PACKED,
    }


@dataclass(frozen=True, slots=True)
class CompressedTensorsConfig:
    """A configuration as read: targets and scheme of each config group."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]

    def scheme_for(self, name: str) -> Scheme:
        """Return the scheme of linear `name`: by name, then by pattern, then by module class.

        Raises:
            FormatError: no group targets it.
        """
        for targets, scheme in self.groups:
            if name in targets:
                return scheme
        for targets, scheme in self.groups:
            for target in targets:
                if target.startswith(REGEX) and matches(
                    target.removeprefix(REGEX), name, where=f"target {target[:80]!r}"
                ):
                    return scheme
        by_class = [scheme for targets, scheme in self.groups if any(_is_class(target) for target in targets)]
        if len(by_class) == 1:
            return by_class[0]
        raise FormatError(
            f"quantization_config.config_groups, linear {name}",
            expected="one group that targets it",
            found=f"{len(by_class)} that might",
            action="Name the linear in the targets of its group.",
        )


def read_compressed_tensors_config(folder: CheckpointFolder) -> CompressedTensorsConfig:
    """Return the configuration in config.json; FormatError for what is not weight-only packed integers."""
    where = f"{folder.path}, quantization_config"
    content = folder.config["quantization_config"]
    groups = content.get("config_groups")
    _require(isinstance(groups, dict) and bool(groups), f"{where}.config_groups", "a table of groups", groups)
    return CompressedTensorsConfig(
        groups=tuple(
            _read_group(group, f"{where}.config_groups.{key}", default_format=content.get("format"))
            for key, group in groups.items()
        )
    )


def _read_group(group: object, where: str, *, default_format: object) -> tuple[tuple[str, ...], Scheme]:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise _bad(where, "a group with a scheme for weights", group)
    weights, targets = group["weights"], group.get("targets")
    form = group.get("format") or default_format
    _require(form == PACKED, f"{where}.format", PACKED, form)
    good_targets = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    _require(good_targets, f"{where}.targets", "a list of names", targets)
    _require(weights.get("type") == "int", f"{where}.weights.type", "int", weights.get("type"))
    _require(
        group.get("input_activations") is None, f"{where}.input_activations", "null", group.get("input_activations")
    )
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
    _require(type(bits) is int and 1 <= bits <= 8, f"{where}.weights.num_bits", "1 to 8", bits)
    _require(isinstance(symmetric, bool), f"{where}.weights.symmetric", "true or false", symmetric)
    return tuple(targets or ()), Scheme(bits or 0, _group_size(weights, where), symmetric)


def _group_size(weights: Mapping[str, Any], where: str) -> int:
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "channel" if group_size in (None, -1) else "group"
    _require(strategy in STRATEGIES, f"{where}.weights.strategy", " or ".join(STRATEGIES), strategy)
    if strategy == "channel":
        return -1
    if type(group_size) is not int or group_size < 1:
        raise _bad(f"{where}.weights.group_size", "a positive integer", group_size)
    return group_size


def _scheme_of(layout: LinearLayout) -> Scheme:
    return Scheme(layout.bits or 0, layout.group_size, layout.symmetric)


def _is_class(target: str) -> bool:
    return not target.startswith(REGEX) and "." not in target and target[:1].isupper()


def _require(good: bool, where: str, expected: str, found: object) -> None:
    if not good:
        raise _bad(where, expected, found)


def _bad(where: str, expected: str, found: object) -> FormatError:
    return FormatError(
        where,
        expected=expected,
        found=repr(found)[:200],
        action="Only weight-only integer checkpoints (pack-quantized) are read; convert it with the tool that made it.",
    )
