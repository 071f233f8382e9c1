"""The section about the output head: what it takes, and what cannot be asked together."""

from __future__ import annotations

import pytest

from optgptq.errors import RecipeError
from optgptq.recipe.loading import load_recipe, recipe_for_record


def test_no_shipped_recipe_touches_the_head() -> None:
    recipe = load_recipe("gptq-w4")
    assert not recipe.head.is_quantized
    expected = {"bits": None, "group_size": None, "symmetric": True, "method": "gptq"}
    assert recipe_for_record(recipe)["head"] == expected


@pytest.mark.parametrize(
    "settings",
    [
        ["head.bits=8"],
        ["head.bits=4", "head.group_size=-1", "head.symmetric=false", "head.method=rtn"],
        ["head.bits=4", "weights.order=activation", "weights.group_size=-1"],
        ["head.bits=4", "weights.order=activation", "weights.group_grids=static"],
        ["head.bits=8", "weights.method=rtn", "export.format=compressed-tensors"],
    ],
)
def test_what_can_be_asked(settings: list[str]) -> None:
    assert load_recipe("gptq-w4", settings).head.is_quantized


@pytest.mark.parametrize(
    ("name", "settings", "where"),
    [
        ("gptq-w4", ["head.bits=3"], "head.bits"),
        ("gptq-w4", ["head.bits=8", "head.group_size=8"], "head.group_size"),
        ("gptq-w4", ["head.bits=8", "head.method=binary"], "head.method"),
        ("gptq-w4", ["head.method=rtn"], "head.method"),
        ("gptq-w4", ["head.group_size=64"], "head.group_size"),
        ("kv4", ["head.bits=8"], "head.bits"),
        ("binary-w3", ["head.bits=4"], "head.bits"),
        (
            "gptq-w4",
            ["head.bits=4", "head.group_size=64", "weights.order=min_pivot", "weights.group_size=-1"],
            "head.group_size",
        ),
    ],
)
def test_what_cannot_be_asked(name: str, settings: list[str], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, settings)
    assert where in caught.value.where
    assert "--set" not in caught.value.action
