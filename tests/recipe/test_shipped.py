"""The recipes that travel with the package do what their names say, and each of their parts can be switched."""

from __future__ import annotations

import pytest
from support.shipped import SHIPPED

from optgptq.errors import RecipeError
from optgptq.recipe import load_recipe, shipped_recipes


def test_shipped_recipes_are_named_after_their_files_and_described() -> None:
    shipped = shipped_recipes()
    assert tuple(recipe.name for recipe in shipped) == SHIPPED
    for entry in shipped:
        recipe = load_recipe(entry.name)
        assert recipe.name == entry.name
        assert recipe.description == entry.description != ""
        assert load_recipe(str(entry.path)) == recipe


@pytest.mark.parametrize(
    ("name", "method", "bits", "group_size", "symmetric", "layout"),
    [
        ("attention-aware-w4", "attention_aware", 4, 128, True, "gptq"),
        ("attention-aware-w3", "attention_aware", 3, 128, True, "compressed-tensors"),
        ("attention-aware-w2", "attention_aware", 2, 64, True, "compressed-tensors"),
        ("attention-aware-w4-channel", "attention_aware", 4, -1, True, "gptq"),
        ("attention-aware-w2-rotated", "attention_aware", 2, 64, True, "compressed-tensors"),
        ("gptq-w8", "gptq", 8, 128, True, "gptq"),
        ("gptq-w4", "gptq", 4, 128, True, "gptq"),
        ("gptq-w3", "gptq", 3, 128, True, "compressed-tensors"),
        ("gptq-w2", "gptq", 2, 64, True, "compressed-tensors"),
        ("rtn-w4", "rtn", 4, 128, True, "gptq"),
        ("binary-w3", "binary", 3, 128, True, "optgptq"),
        ("binary-w2", "binary", 2, 128, True, "optgptq"),
        ("attention-aware-binary-w3", "attention_aware_binary", 3, 128, True, "optgptq"),
        ("attention-aware-binary-w2", "attention_aware_binary", 2, 128, True, "optgptq"),
        ("gptqt-w3", "gptqt", 3, -1, True, "optgptq"),
        ("gptqt-w2", "gptqt", 2, -1, True, "optgptq"),
    ],
)
def test_shipped_recipes_do_what_their_names_say(
    name: str, method: str, bits: int, group_size: int, symmetric: bool, layout: str
) -> None:
    recipe = load_recipe(name)
    found = (recipe.weights.method, recipe.weights.bits, recipe.weights.group_size, recipe.weights.symmetric)
    assert found == (method, bits, group_size, symmetric)
    assert recipe.export.format == layout
    assert recipe.calibration.source == "self"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_attention_aware_recipes_see_attention_and_correct_errors(bits: int) -> None:
    recipe = load_recipe(f"attention-aware-w{bits}")
    assert recipe.weights.target_shift == "exact"
    assert recipe.weights.shift_strength == "held_out"
    assert recipe.weights.scale_refit
    plain = load_recipe(f"gptq-w{bits}")
    for field in ("bits", "group_size", "symmetric", "order", "grid_search", "group_grids", "damp_ratio"):
        assert getattr(recipe.weights, field) == getattr(plain.weights, field)
    assert recipe.export == plain.export
    # The one step with gradients is off.
    assert recipe.norm_tweaking.steps == 0


def test_every_part_can_be_switched_by_an_override() -> None:
    switches = {
        "weights.target_shift": "off",
        "weights.shift_strength": "0.5",
        "weights.scale_refit": "false",
        "weights.code_sweeps": "0",
        "attention.rows": "pooled",
        "attention.values": "false",
        "attention.value_rows": "false",
        "transform.fold_norms": "true",
        "transform.residual_rotation": "hadamard",
        "transform.value_rotation": "random",
    }
    recipe = load_recipe("attention-aware-w3", [f"{path}={value}" for path, value in switches.items()])
    for path, value in switches.items():
        section, field = path.split(".")
        assert str(recipe.model_dump()[section][field]).lower() == value


@pytest.mark.parametrize(
    ("field", "value", "where", "expected"),
    [
        (
            "weights.true_sequential",
            "false",
            "weights.true_sequential",
            "true where targets are shifted, since each stage makes up for those before it",
        ),
        (
            "calibration.moment_stream",
            "full_precision",
            "calibration.moment_stream",
            "quantized where targets are shifted",
        ),
    ],
)
def test_a_target_shift_needs_the_quantized_stream_stage_by_stage(
    field: str, value: str, where: str, expected: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("attention-aware-w4", [f"{field}={value}"])
    error = caught.value
    kept = {"false": "true", "full_precision": "quantized"}[value]
    assert error.where.endswith(where)
    assert (error.expected, error.found) == (expected, f"{value} with target_shift exact")
    assert error.action == f"Set {where}={kept} or weights.target_shift=off."
    assert error.exit_code == 2
    load_recipe("attention-aware-w4", [f"{field}={value}", "weights.target_shift=off"])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_variants_differ_from_their_recipe_in_what_they_are_named_after(bits: int) -> None:
    recipe = load_recipe(f"attention-aware-w{bits}")
    channel, rotated = (load_recipe(f"attention-aware-w{bits}-{name}") for name in ("channel", "rotated"))
    assert channel.weights == recipe.weights.model_copy(update={"group_size": -1})
    assert rotated.weights == recipe.weights
    assert rotated.transform.residual_rotation == rotated.transform.value_rotation == "hadamard"
    assert channel.attention == rotated.attention == recipe.attention


GPTAQ = ("weights.target_shift=gptaq", "weights.shift_strength=0.25")


def test_the_published_rule_runs_with_plain_gptq() -> None:
    assert load_recipe("gptq-w4", GPTAQ).weights.target_shift == "gptaq"
    load_recipe("gptq-w4", [*GPTAQ, "weights.group_size=96", "weights.group_grids=static"])


@pytest.mark.parametrize(
    "setting",
    [
        "weights.shift_strength=held_out",
        "weights.method=attention_aware",
        "weights.rules=[{match: down_proj, method: rtn}]",
        "weights.scale_refit=true",
        "weights.code_sweeps=1",
        "weights.group_size=96",
        "weights.rules=[{match: down_proj, group_size: 96}]",
    ],
)
def test_the_published_rule_is_refused_where_it_is_not_defined(setting: str) -> None:
    with pytest.raises(RecipeError, match=r"weights\.target_shift") as caught:
        load_recipe("gptq-w4", [*GPTAQ, setting])
    assert caught.value.exit_code == 2
