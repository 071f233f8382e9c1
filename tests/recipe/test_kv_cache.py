"""The section kv_cache: what is taken, what is refused, and what the recipes that ship with it say."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from optgptq.errors import RecipeError
from optgptq.recipe import KVCacheRecipe, Recipe, load_recipe
from optgptq.recipe.kv_cache import layer_ranges


def refused(*overrides: str, recipe: str = "kv4") -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    assert caught.value.exit_code == 2
    return caught.value


def test_nothing_is_quantized_unless_it_is_asked() -> None:
    assert not Recipe().kv_cache.is_quantized
    assert not KVCacheRecipe(bits=16, key_axis="token", sink_tokens=9).is_quantized


@pytest.mark.parametrize(
    ("values", "smallest"),
    [
        ({"bits": 8}, 8),
        ({"key_bits": 4}, 4),
        ({"bits": 4, "value_bits": 2}, 2),
        ({"bits": 2, "key_bits": 16, "value_bits": 8}, 8),
        ({"layers": [{"layers": "3", "value_bits": 3}]}, 3),
    ],
)
def test_the_fewest_bits_of_any_side(values: dict[str, object], smallest: int) -> None:
    recipe = KVCacheRecipe.model_validate(values)
    assert recipe.smallest_bits == smallest
    assert recipe.is_quantized


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 5),
        ("bits", "4"),
        ("bits", True),
        ("key_bits", 1),
        ("group_size", 8),
        ("key_axis", "head"),
        ("key_group_tokens", 24),
        ("sink_tokens", -1),
        ("sink_tokens", 1.5),
        ("recent_tokens", -1),
        ("past_only", "window"),
        ("past_only", "window:0"),
        ("past_only", "window:-8"),
        ("past_only", "window: 8"),
        ("past_only", 8),
        ("past_only", False),
        ("key_transform", "random"),
        ("rounding", "up"),
        ("calibrated", 1),
        ("budget_bits", 1.9),
        ("budget_bits", 9),
        ("budget_bits", float("nan")),
        ("skip_layers", ""),
        ("skip_layers", "1-"),
        ("skip_layers", "1;2"),
        ("skip_layers", "-1"),
        ("skip_layers", True),
        ("num_windows", 0),
        ("refine", "adam"),
        ("fp8_scales", "channel"),
        ("layers", [{"key_bits": 4}]),
        ("layers", [{"layers": "0", "group_size": 32}]),
    ],
)
def test_values_that_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError):
        KVCacheRecipe.model_validate({field: value})


def test_layers_are_numbers_and_ranges() -> None:
    assert layer_ranges("0-3,7,12-12") == ((0, 3), (7, 7), (12, 12))
    assert load_recipe("kv4", ["kv_cache.skip_layers=3"]).kv_cache.skip_layers == "3"
    assert KVCacheRecipe.model_validate({"bits": 4, "skip_layers": 3}).skip_layers == "3"
    error = refused("kv_cache.skip_layers=0,9-4")
    assert (error.expected, error.found, error.action) == ("ranges that go up", "9-4", "Write 4-9.")
    error = refused("kv_cache.layers=[{layers: 5-2, key_bits: 2}]")
    assert error.where.endswith("kv_cache.layers.0.layers")


def test_a_mode_that_is_none_names_those_that_are() -> None:
    error = refused("kv_cache.past_only=all")
    assert error.expected == "one of off, token, chunk or a window such as window:64"
    assert load_recipe("kv4", ["kv_cache.past_only=window:96"]).kv_cache.past_only == "window:96"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("key_transform", "covariance", "auto or none or hadamard"),
        ("value_transform", "shift_scale", "auto or none or hadamard"),
        ("rounding", "fitted", "null or nearest"),
        ("budget_bits", "3.5", "null"),
        ("fold", "true", "false"),
        ("refine", "gradient", "off"),
    ],
)
def test_what_only_a_calibration_finds_needs_one(field: str, value: str, expected: str) -> None:
    error = refused("kv_cache.calibrated=false", f"kv_cache.{field}={value}")
    assert error.where.endswith(f"kv_cache.{field}")
    assert error.expected == f"{expected} where nothing is calibrated"
    assert error.found == f"{value} with calibrated false"
    assert error.action == f"Leave kv_cache.{field} out, or set kv_cache.calibrated=true."
    load_recipe("kv4", [f"kv_cache.{field}={value}"])
    # Where nothing is quantized the rest means nothing.
    load_recipe("gptq-w4", ["kv_cache.calibrated=false", f"kv_cache.{field}={value}"])


def test_groups_along_tokens_are_not_fitted() -> None:
    error = refused("kv_cache.key_axis=token", "kv_cache.rounding=fitted")
    assert error.where.endswith("kv_cache.rounding")
    assert error.found == "fitted with key_axis token"
    assert load_recipe("kv2", ["kv_cache.key_axis=token"]).kv_cache.key_group_tokens == 32


def test_scales_of_other_engines_need_the_layout_that_they_read() -> None:
    error = refused("kv_cache.fp8_scales=head", recipe="gptq-w4")
    assert error.where.endswith("kv_cache.fp8_scales")
    assert error.found == "head with export.format gptq"
    recipe = load_recipe("gptq-w4", ["kv_cache.fp8_scales=head", "export.format=compressed-tensors"])
    assert recipe.kv_cache.fp8_scales == "head"


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("weights.bits=3", "weights.bits"),
        ("weights.rules=[{match: down_proj, bits: 8}]", "weights.rules"),
        ("weights.target_shift=exact", "weights.target_shift"),
        ("norm_tweaking.steps=4", "norm_tweaking.steps"),
        ("export.format=compressed-tensors", "export.format"),
    ],
)
def test_weights_that_stay_as_they_are_have_no_settings(override: str, where: str) -> None:
    error = refused(override)
    assert error.where.endswith(where)
    assert "where weights stay as they are (weights.method none)" in error.expected


def test_a_job_without_anything_to_do_is_refused() -> None:
    error = refused("kv_cache.bits=16")
    assert error.where.endswith("weights.method")
    assert error.found == "none, and nothing else is asked"
    for other in ("gqa.group=2", "transform.value_rotation=hadamard"):
        assert load_recipe("kv4", ["kv_cache.bits=16", other]).weights.method == "none"


def test_a_rule_has_no_method_none() -> None:
    error = refused("weights.rules=[{match: down_proj, method: none}]", recipe="gptq-w4")
    assert error.where.endswith("weights.rules.0.method")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_recipes_of_the_cache_alone(bits: int) -> None:
    recipe = load_recipe(f"kv{bits}")
    assert (recipe.weights.method, recipe.kv_cache.bits) == ("none", bits)
    assert recipe.kv_cache.calibrated
    assert recipe.calibration.source == "self"


def test_weights_and_cache_together_are_the_two_recipes() -> None:
    both, weights, cache = load_recipe("w4-kv4"), load_recipe("gptq-w4"), load_recipe("kv4")
    assert (both.weights, both.export, both.kv_cache) == (weights.weights, weights.export, cache.kv_cache)


@pytest.mark.parametrize("other", [(), ("export.format=compressed-tensors",)])
def test_scales_for_other_engines_need_weights_of_a_method(other: tuple[str, ...]) -> None:
    # Whichever check speaks, what it advises is not what another one refuses.
    for recipe in ("kv4",):
        action = refused("kv_cache.fp8_scales=head", *other, recipe=recipe).action
        assert "weights.method" in action
        assert not action.startswith("Set export.format")
