"""What is decided about every linear before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.quantizable import tiny_model, tiny_recipe, wide_llama, write_model

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import RecipeError
from optgptq.formats import format_named
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.plan import LinearPlan, plan_linears
from optgptq.recipe.records import Recipe
from optgptq.recipe.weights import WeightRecipe

ATTENTION = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


@pytest.fixture(scope="module")
def spec() -> DecoderSpec:
    return model_spec(CheckpointFolder.open(bundled_path("story-llama")))


def plan(spec: DecoderSpec, *, form: str = "gptq", **weights: Any) -> dict[str, LinearPlan]:
    recipe = Recipe(weights=WeightRecipe(**{"group_size": 64, **weights}))
    return {plan.info.name: plan for plan in plan_linears(spec, recipe, format_named(form))}


def test_every_linear_is_planned_in_the_order_of_the_walk(spec: DecoderSpec) -> None:
    plans = plan(spec, bits=3, symmetric=False, grid_search="mse", group_grids="static")
    assert len(plans) == 7 * spec.num_layers
    assert [name.rsplit(".", 1)[1] for name in list(plans)[:7]] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    found = plans["model.layers.1.mlp.down_proj"]
    assert (found.info.layer_index, found.info.stage, found.method, found.reason) == (1, "down", "gptq", None)
    assert (found.layout.bits, found.layout.group_size, found.layout.symmetric) == (3, 64, False)
    assert found.layout.in_features == found.info.in_features
    assert found.grid is not None
    assert (found.grid.bits, found.grid.search, found.grid.group_grids) == (3, "mse", "static")
    assert plans[ATTENTION[0]].layout.fused_names == ATTENTION
    assert plans[ATTENTION[0]].layout.fused_name == "model.layers.0.self_attn.qkv_proj"


@pytest.mark.parametrize(("form", "smallest"), [("gptq", 1), ("gptq_v2", 0), ("compressed-tensors", 0)])
def test_the_format_says_which_zero_points_there_are(spec: DecoderSpec, form: str, smallest: int) -> None:
    grid = plan(spec, form=form)[ATTENTION[0]].grid
    assert grid is not None
    assert grid.smallest_zero_point == smallest


def test_rules_change_what_they_name_and_say_why(spec: DecoderSpec) -> None:
    rules = (
        {"match": "down_proj", "bits": 8, "group_size": 16, "method": "rtn", "description": "feeds the residual"},
        {"match": r"layers\.0\.self_attn\.[qkv]", "symmetric": False, "grid_search": "minmax"},
    )
    plans = plan(spec, keep_dense=(r"layers\.5\.",), rules=rules)
    down = plans["model.layers.1.mlp.down_proj"]
    assert (down.method, down.layout.bits, down.layout.group_size) == ("rtn", 8, 16)
    assert down.reason == "weights.rules.0 'down_proj': feeds the residual"
    query = plans[ATTENTION[0]]
    assert query.grid is not None
    assert (query.layout.symmetric, query.grid.search, query.layout.bits) == (False, "minmax", 4)
    dense = plans["model.layers.5.self_attn.o_proj"]
    assert (dense.grid, dense.layout.bits) == (None, None)
    assert dense.layout.dense_reason == r"kept dense by weights.keep_dense.0 'layers\\.5\\.'"
    assert plans["model.layers.1.self_attn.o_proj"].layout.dense_reason is None


@pytest.mark.parametrize(
    "weights",
    [
        {"rules": ({"match": "q_proj", "bits": 8},)},
        {"rules": ({"match": "k_proj", "group_size": 32},)},
        {"rules": ({"match": "v_proj", "symmetric": False},)},
        {"rules": ({"match": r"layers\.2\.mlp\.up_proj", "keep_dense": True},)},
        {"keep_dense": ("gate_proj",)},
    ],
)
def test_linears_that_engines_fuse_must_be_stored_alike(spec: DecoderSpec, weights: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(spec, **weights)
    assert "engines load both as model.layers." in caught.value.expected
    assert "4 bits, group_size 64, symmetric True" in caught.value.found
    assert caught.value.action.startswith("Let the pattern match all of model.layers.")


def test_fused_linears_may_differ_in_how_they_are_solved(spec: DecoderSpec) -> None:
    plans = plan(spec, rules=({"match": "q_proj", "method": "rtn", "grid_search": "mse"},))
    assert [plans[name].method for name in ATTENTION] == ["rtn", "gptq", "gptq"]


@pytest.mark.parametrize("weights", [{"keep_dense": ("qproj",)}, {"rules": ({"match": "qproj", "bits": 8},)}])
def test_patterns_that_match_nothing_are_refused(spec: DecoderSpec, weights: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(spec, **weights)
    assert "'qproj', which is in none of 42 names" in caught.value.found


def test_a_group_size_that_does_not_divide_names_the_linear_and_one_that_fits(tmp_path: Path) -> None:
    wide = model_spec(CheckpointFolder.open(write_model(wide_llama(), tmp_path / "wide")))
    with pytest.raises(RecipeError) as caught:
        plan(wide, group_size=64)
    assert caught.value.where == "weights.group_size for model.layers.0.self_attn.q_proj"
    assert caught.value.expected == "a divisor of its 48 input columns"
    assert caught.value.found == "64 (the same for 13 other linears)"
    assert caught.value.action.startswith("Set weights.group_size=16, which divides every linear, or ")
    assert plan(wide, group_size=16)[ATTENTION[0]].layout.num_groups == 3
    kept = plan(wide, group_size=96, keep_dense=("q_proj|k_proj|v_proj|o_proj|gate|up",))
    assert kept["model.layers.0.mlp.down_proj"].layout.num_groups == 1


def test_where_no_group_size_fits_one_group_a_row_is_advised(tmp_path: Path) -> None:
    narrow = model_spec(CheckpointFolder.open(write_model(tiny_model("llama-grouped_query"), tmp_path / "narrow")))
    with pytest.raises(RecipeError, match=r"Use -1 \(one group a row\)"):
        plan(narrow, group_size=16)
    assert {plan.layout.num_groups for plan in plan_linears(narrow, tiny_recipe(), format_named("gptq"))} == {1}


def test_something_must_be_left_to_quantize(spec: DecoderSpec) -> None:
    with pytest.raises(RecipeError, match="found all 42 kept dense"):
        plan(spec, keep_dense=("proj",))
