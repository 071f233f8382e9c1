"""What a conversion will make of a model, known from its config alone, or why it cannot be made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from optgptq.checkpoint.source import TensorSource
from optgptq.checkpoint.writer import TensorEntry
from optgptq.errors import ModelError, RecipeError
from optgptq.gqa.layer import Grouping, GroupingSettings
from optgptq.models.inventory import layer_linears
from optgptq.models.registry import FAMILIES, config_spec, family_of
from optgptq.models.spec import DecoderSpec
from optgptq.recipe.records import Recipe


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GroupingPlan:
    """A conversion that can be made.

    Attributes:
        spec, new_spec: the model as it is, and with fewer key/value heads.
        config: the new config.json.
        entries: the tensors of attention in the new model, layer by layer.
        settings: how layers are converted.
    """

    spec: DecoderSpec
    new_spec: DecoderSpec
    config: Mapping[str, Any]
    entries: tuple[TensorEntry, ...]
    settings: GroupingSettings


def plan_grouping(source: TensorSource, spec: DecoderSpec, recipe: Recipe) -> GroupingPlan | None:
    """Return the conversion that the recipe asks for; None where it asks for none.

    Raises:
        RecipeError: the number of heads does not divide, or a grouping that ALiBi does not allow.
        ModelError: the family cannot express the result, or its attention cannot be rewritten.
    """
    size = recipe.gqa.group
    if size == 1:
        return None
    family = family_of(source.config)
    if family.with_kv_heads is None:
        raise _inexpressible(family.name)
    if reason := _refusal(spec):
        raise ModelError(
            "gqa.group",
            expected=f"1 for this {family.name} model, since {reason}",
            found=str(size),
            action="Set gqa.group=1.",
        )
    if spec.num_kv_heads % size:
        raise RecipeError(
            "gqa.group",
            expected=f"a divisor of the model's {spec.num_kv_heads} key/value heads",
            found=str(size),
            action="Choose another number, or 1 to leave the heads as they are.",
        )
    config = family.with_kv_heads(source.config, spec.num_kv_heads // size)
    new_spec = replace(config_spec(config), names=spec.names)
    settings = GroupingSettings(
        size=size,
        grouping=_grouping(spec, recipe),
        refit_queries=recipe.gqa.refit_queries,
        refit_output=recipe.gqa.refit_output,
        moment_dtype=torch.float64 if recipe.calibration.moment_dtype == "float64" else torch.float32,
    )
    return GroupingPlan(
        spec=spec, new_spec=new_spec, config=config, entries=_entries(source, new_spec), settings=settings
    )


def kv_bytes_per_token(spec: DecoderSpec) -> int:
    """Return the bytes of the keys and values of one token in all layers, 16 bits each."""
    return 2 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim


def _entries(source: TensorSource, new_spec: DecoderSpec) -> tuple[TensorEntry, ...]:
    entries = []
    for index in range(new_spec.num_layers):
        for linear in layer_linears(new_spec, index):
            if linear.stage in ("qkv", "o"):
                weight, bias = f"{linear.name}.weight", f"{linear.name}.bias"
                entries.append(TensorEntry(weight, source.info(weight).torch_dtype, linear.stored_shape))
                if linear.has_bias:
                    entries.append(TensorEntry(bias, source.info(bias).torch_dtype, (linear.out_features,)))
    return tuple(entries)


def _grouping(spec: DecoderSpec, recipe: Recipe) -> Grouping:
    asked = recipe.gqa.grouping
    if asked == "auto":
        return "similarity" if spec.alibi is None else "adjacent"
    if spec.alibi is not None and asked != "adjacent":
        raise RecipeError(
            "gqa.grouping",
            expected="adjacent or auto for a model with ALiBi, whose slopes belong to the places of its heads",
            found=asked,
            action="Set gqa.grouping=auto.",
        )
    return asked


def _refusal(spec: DecoderSpec) -> str | None:
    if spec.names.key_norm is not None:
        return "a norm stands between its key projection and attention, and norms of several keys do not merge"
    if spec.clip_qkv is not None:
        return f"its keys and values are clipped at {spec.clip_qkv}, number by number, and merging mixes the numbers"
    if spec.num_kv_heads == 1:
        return "it has one key/value head already"
    return None


def _inexpressible(family: str) -> ModelError:
    able = ", ".join(sorted(each.name for each in FAMILIES if each.with_kv_heads is not None))
    return ModelError(
        "gqa.group",
        expected=f"1, or a model of a family whose config can say that query heads share keys ({able})",
        found=f"a model of the family {family}, whose config cannot",
        action="Set gqa.group=1, or use a model of one of these families.",
    )
