"""A recipe after a change that a target asks for, and the `--set` texts that make it."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import ValidationError

from optgptq.recipe.head import HeadRecipe
from optgptq.recipe.overrides import apply_override
from optgptq.recipe.records import Recipe
from optgptq.recipe.weights import BINARY_METHODS
from optgptq.targets.subject import Change
from optgptq.targets.vary import dense_patterns


def changed_recipe(recipe: Recipe, change: Change) -> tuple[Recipe, tuple[str, ...]] | None:
    """Return the recipe with `change`, rules included, and the texts for `--set`; None where no recipe says it."""
    settings = tuple(_settings(recipe, change))
    values = recipe.model_dump(mode="json")
    values["weights"]["rules"] = [rule.model_dump(mode="json", exclude_none=True) for rule in recipe.weights.rules]
    for setting in settings:
        apply_override(values, {}, setting)
    try:
        return Recipe.model_validate(values), settings
    except ValidationError:
        return None


def _settings(recipe: Recipe, change: Change) -> Iterator[str]:
    weights = recipe.weights
    if change.format is not None:
        yield f"export.format={change.format}"
    if change.uniform and weights.method in BINARY_METHODS:
        yield "weights.method=gptq"
    if change.bits is not None and weights.bits < change.bits:
        yield f"weights.bits={change.bits}"
    if change.group_size is not None and weights.group_size != change.group_size:
        yield f"weights.group_size={change.group_size}"
    if change.symmetric and not weights.symmetric:
        yield "weights.symmetric=true"
    yield from _head_settings(recipe, change)
    if change.drop_rules:
        if weights.rules:
            yield "weights.rules=[]"
        kept: tuple[str, ...] = ()
    else:
        yield from _rule_settings(recipe, change)
        kept = weights.keep_dense
    patterns = [*kept, *dense_patterns(change.keep_dense)]
    if tuple(patterns) != weights.keep_dense:
        yield f"weights.keep_dense={json.dumps(patterns)}"


def _head_settings(recipe: Recipe, change: Change) -> Iterator[str]:
    head = recipe.head
    if not head.is_quantized:
        return
    if change.dense_head:
        # Its other fields mean nothing then, and must have their defaults.
        for name, field in HeadRecipe.model_fields.items():
            if getattr(head, name) != field.default:
                yield f"head.{name}={json.dumps(field.default)}"
        return
    if change.bits is not None and head.bits is not None and head.bits < change.bits:
        yield f"head.bits={change.bits}"
    if change.group_size is not None and head.group_size not in (None, change.group_size):
        yield f"head.group_size={change.group_size}"
    if change.symmetric and not head.symmetric:
        yield "head.symmetric=true"


def _rule_settings(recipe: Recipe, change: Change) -> Iterator[str]:
    for index, rule in enumerate(recipe.weights.rules):
        where = f"weights.rules.{index}"
        if change.uniform and rule.method in BINARY_METHODS:
            yield f"{where}.method=gptq"
        if change.bits is not None and rule.bits is not None and rule.bits < change.bits:
            yield f"{where}.bits={change.bits}"
        if change.group_size is not None and rule.group_size not in (None, change.group_size):
            yield f"{where}.group_size={change.group_size}"
        if change.symmetric and rule.symmetric is False:
            yield f"{where}.symmetric=true"
