from __future__ import annotations

import json
from typing import Any

import pytest

from optgptq.errors import RecipeError
from optgptq.recipe import Recipe, load_recipe
from optgptq.recipe.fields import keys_at
from optgptq.recipe.overrides import apply_override


def applied(recipe: dict[str, Any], *overrides: str) -> dict[str, Any]:
    written: dict[Any, str] = {}
    for override in overrides:
        apply_override(recipe, written, override)
    return recipe


def test_sections_are_created_and_the_last_override_wins() -> None:
    assert applied({}, "weights.bits=3", "weights.bits=8", "export.format=gptq_v2") == {
        "weights": {"bits": 8},
        "export": {"format": "gptq_v2"},
    }


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("weights.bits=3", ("weights", "bits"), 3),
        ("weights.symmetric=false", ("weights", "symmetric"), False),
        ("weights.damp_ratio=1e-3", ("weights", "damp_ratio"), 0.001),
        ("weights.keep_dense=[o_proj$, 'down,proj']", ("weights", "keep_dense"), ("o_proj$", "down,proj")),
        ("calibration.source=bundled:story-calibration", ("calibration", "source"), "bundled:story-calibration"),
        ("calibration.source=a=b.txt", ("calibration", "source"), "a=b.txt"),
        ("calibration.revision=1234567", ("calibration", "revision"), "1234567"),
        ("calibration.revision=1e10", ("calibration", "revision"), "1e10"),
        ("calibration.revision=null", ("calibration", "revision"), None),
        ("calibration.config=2024", ("calibration", "config"), "2024"),
        ("calibration.window_size=null", ("calibration", "window_size"), None),
        ("export.max_shard_bytes=500MB", ("export", "max_shard_bytes"), 500_000_000),
    ],
)
def test_values_of_any_kind(override: str, path: tuple[str, str], value: object) -> None:
    recipe = load_recipe("gptq-w4", [override]).model_dump()
    assert recipe[path[0]][path[1]] == value


def test_a_rule_can_be_changed_by_its_number() -> None:
    recipe = load_recipe("gptq-w4", ["weights.rules=[{match: o_proj, bits: 8}]", "weights.rules.0.bits=3"])
    assert recipe.weights.rules[0].bits == 3


def test_every_field_can_be_set_to_what_it_has() -> None:
    defaults = Recipe().model_dump(mode="json")
    for section in ("weights", "calibration", "kv_cache", "export"):
        for key in keys_at((section,)):
            value = defaults[section][key]
            override = f"{section}.{key}={json.dumps(value)}"
            assert load_recipe("gptq-w4", [override]).model_dump(mode="json")[section][key] == value


@pytest.mark.parametrize(
    ("override", "expected", "found"),
    [
        ("weights.bits", "a dotted field and its value, such as weights.bits=3", "'weights.bits'"),
        ("=3", "a dotted field and its value, such as weights.bits=3", "'=3'"),
        ("weights..bits=3", "a dotted field and its value, such as weights.bits=3", "'weights..bits=3'"),
        ("weights.bits.low=3", "a section or list at weights.bits", "the single value 4"),
        ("weights.rules.1.bits=3", "a number below 1: weights.rules has 1 items", "1"),
        ("weights.rules.first.bits=3", "a number below 1: weights.rules has 1 items", "'first'"),
        ("weights.rules.2=3", "a number below 1: weights.rules has 1 items", "2"),
    ],
)
def test_overrides_that_lead_nowhere(override: str, expected: str, found: str) -> None:
    with pytest.raises(RecipeError) as caught:
        applied({"weights": {"bits": 4, "rules": [{"match": "a"}]}}, override)
    assert caught.value.where == f"--set {override}"
    assert (caught.value.expected, caught.value.found) == (expected, found)


def test_a_value_that_is_not_yaml() -> None:
    with pytest.raises(RecipeError) as caught:
        applied({}, "weights.keep_dense=[a")
    assert caught.value.where == "--set weights.keep_dense=[a line 1"
    assert caught.value.expected == "valid YAML"
