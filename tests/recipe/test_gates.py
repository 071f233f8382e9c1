"""The list of gates and the section that sets them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optgptq.errors import RecipeError
from optgptq.recipe.gates import GATES, GatesRecipe
from optgptq.recipe.loading import load_recipe, recipe_for_record
from optgptq.recipe.records import Recipe

BUNDLED = "gates.text=bundled:story-evaluation"


def test_every_gate_is_a_field_and_every_limit_of_the_section_is_a_gate() -> None:
    limits = [name for name in GatesRecipe.model_fields if name.startswith(("max_", "min_")) and name != "max_tokens"]
    assert limits == list(GATES)
    assert all(kind.name == name and kind.figure and kind.advice for name, kind in GATES.items())
    assert {name for name, kind in GATES.items() if kind.at_least} == {"min_top1", "min_tokens_per_linear"}


def test_nothing_is_asked_by_default() -> None:
    recipe = load_recipe("gptq-w4")
    assert recipe.gates == GatesRecipe()
    assert recipe.gates.is_empty
    assert recipe.gates.limits == {}
    assert not load_recipe("gptq-w4", ["gates.sample_prompt=Once"]).gates.is_empty


def test_limits_come_in_the_order_of_the_list() -> None:
    recipe = load_recipe("gptq-w4", [BUNDLED, "gates.max_damp_ratio=1", "gates.max_kl=0.02", "gates.max_perplexity=9"])
    assert recipe.gates.limits == {"max_perplexity": 9.0, "max_kl": 0.02, "max_damp_ratio": 1.0}


@pytest.mark.parametrize("name", [name for name, kind in GATES.items() if kind.is_measured])
def test_a_measured_gate_needs_a_text(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("gptq-w4", [f"gates.{name}=0.5"])
    assert "gates.text" in caught.value.where
    assert name in caught.value.expected
    assert load_recipe("gptq-w4", [f"gates.{name}=0.5", BUNDLED]).gates.limits == {name: 0.5}


@pytest.mark.parametrize("name", [name for name, kind in GATES.items() if not kind.is_measured])
def test_other_gates_need_none(name: str) -> None:
    assert load_recipe("gptq-w4", [f"gates.{name}=1"]).gates.limits == {name: 1.0}


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("gates.max_kl=-0.1", "max_kl"),
        ("gates.max_kl=.nan", "max_kl"),
        ("gates.max_kl=.inf", "max_kl"),
        ("gates.max_kl=true", "max_kl"),
        ("gates.min_top1=1.5", "min_top1"),
        ("gates.max_dense_share=1.01", "max_dense_share"),
        ("gates.min_tokens_per_linear=0.5", "min_tokens_per_linear"),
        ("gates.text=self", "text"),
        ("gates.window_size=1", "window_size"),
        ("gates.sample_prompt=''", "sample_prompt"),
        ("gates.max_ppl=3", "max_ppl"),
    ],
)
def test_limits_without_a_meaning_are_refused(override: str, where: str) -> None:
    with pytest.raises(RecipeError, match=f"gates.{where}"):
        load_recipe("gptq-w4", [override])


def test_fewer_tokens_than_a_window_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("gptq-w4", [BUNDLED, "gates.window_size=512", "gates.max_tokens=511"])
    assert "gates.max_tokens" in caught.value.where
    assert caught.value.expected == "at least one window, 512 tokens"


@given(st.sampled_from(list(GATES)), st.floats(0, 1))
def test_any_share_is_a_limit_and_comes_back(name: str, limit: float) -> None:
    value = 3 if name == "min_tokens_per_linear" else limit
    section = GatesRecipe.model_validate({"text": "a.txt", name: value})
    assert section.limits == {name: float(value)}


def test_a_record_names_the_text_without_its_folder() -> None:
    recipe = Recipe(gates=GatesRecipe(text="/some/where/news.txt", max_kl=0.1))
    assert recipe_for_record(recipe)["gates"]["text"] == "news.txt"
    assert recipe_for_record(load_recipe("gptq-w4", [BUNDLED]))["gates"]["text"] == "bundled:story-evaluation"
