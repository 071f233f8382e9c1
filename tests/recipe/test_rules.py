from __future__ import annotations

import pytest

from optgptq.errors import RecipeError
from optgptq.recipe import ResolvedWeight, WeightRecipe, WeightRule, check_rules, resolve_weight

Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.11.mlp.down_proj"


def test_without_rules_the_defaults_hold() -> None:
    assert resolve_weight(WeightRecipe(), Q_PROJ) == ResolvedWeight(
        method="gptq", bits=4, group_size=128, symmetric=True, grid_search="walk", keep_dense=False, reason=None
    )


def test_rules_are_applied_in_order_and_change_only_what_they_name() -> None:
    weights = WeightRecipe(
        rules=(
            WeightRule(match="down_proj", bits=8, symmetric=False),
            WeightRule(match=r"layers\.11\.", bits=3, group_size=-1, description="the last layer is robust"),
        )
    )
    assert resolve_weight(weights, DOWN_PROJ) == ResolvedWeight(
        method="gptq",
        bits=3,
        group_size=-1,
        symmetric=False,
        grid_search="walk",
        reason=r"weights.rules.1 'layers\\.11\\.': the last layer is robust",
    )
    assert resolve_weight(weights, "model.layers.1.mlp.down_proj").bits == 8
    assert resolve_weight(weights, Q_PROJ).reason is None


def test_every_field_of_a_rule_takes_effect() -> None:
    rule = WeightRule(
        match="q_proj", method="rtn", bits=8, group_size=32, symmetric=False, grid_search="mse", keep_dense=True
    )
    assert resolve_weight(WeightRecipe(rules=(rule,)), Q_PROJ) == ResolvedWeight(
        method="rtn",
        bits=8,
        group_size=32,
        symmetric=False,
        grid_search="mse",
        keep_dense=True,
        reason="weights.rules.0 'q_proj'",
    )


def test_patterns_are_searched_anywhere_and_can_be_anchored() -> None:
    assert resolve_weight(WeightRecipe(keep_dense=("self_attn",)), Q_PROJ).keep_dense
    assert not resolve_weight(WeightRecipe(keep_dense=("^self_attn",)), Q_PROJ).keep_dense
    kept = resolve_weight(WeightRecipe(keep_dense=("nothing", r"q_proj$")), Q_PROJ)
    assert kept.keep_dense
    assert kept.reason == "kept dense by weights.keep_dense.1 'q_proj$'"


def test_a_rule_can_take_a_linear_back_from_keep_dense() -> None:
    weights = WeightRecipe(keep_dense=("self_attn",), rules=(WeightRule(match="q_proj", keep_dense=False),))
    assert not resolve_weight(weights, Q_PROJ).keep_dense
    assert resolve_weight(weights, "model.layers.0.self_attn.k_proj").keep_dense


@pytest.mark.parametrize(
    ("weights", "where", "pattern"),
    [
        (WeightRecipe(keep_dense=("q_proj", "lm_haed")), "weights.keep_dense.1", "lm_haed"),
        (WeightRecipe(rules=(WeightRule(match="^q_proj"),)), "weights.rules.0.match", "^q_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(weights: WeightRecipe, where: str, pattern: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_rules(weights, [Q_PROJ, DOWN_PROJ, "model.layers.12.mlp.down_proj"])
    error = caught.value
    assert error.where == where
    assert error.expected == (
        f"a pattern found in the name of a linear of this model, such as '{Q_PROJ}' or '{DOWN_PROJ}'"
    )
    assert error.found == f"'{pattern}', which is in none of 3 names"
    assert error.action == "Correct the pattern or remove it; it is a regular expression searched in the full name."


def test_patterns_that_match_are_accepted() -> None:
    check_rules(WeightRecipe(keep_dense=("q_proj",), rules=(WeightRule(match="down"),)), [Q_PROJ, DOWN_PROJ])
    check_rules(WeightRecipe(), [])


def test_a_pattern_that_backtracks_without_end_is_stopped() -> None:
    weights = WeightRecipe(keep_dense=(r"((a|aa)+)+\.x",))
    with pytest.raises(RecipeError) as caught:
        resolve_weight(weights, "a" * 60 + "..")
    assert caught.value.where == "weights.keep_dense.0"
    assert caught.value.expected == "a pattern that is matched in under 0.5 seconds"
