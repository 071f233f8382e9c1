from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from support.shipped import SHIPPED
from typer.testing import CliRunner

from optgptq.errors import UsageError
from optgptq.recipe import load_recipe, recipe_schema
from optgptq_cli.recipes import recipes


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(recipes)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_without_a_name_all_are_listed_with_their_description() -> None:
    lines = run().splitlines()
    assert [line.split()[0] for line in lines] == list(SHIPPED)
    assert all(load_recipe(name).description in line for name, line in zip(list(SHIPPED), lines, strict=True))
    assert run("--quiet").splitlines() == list(SHIPPED)
    assert [entry["name"] for entry in json.loads(run("--json"))["recipes"]] == list(SHIPPED)


def test_a_shown_recipe_can_be_saved_and_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(run("gptq-w3", "--set", "weights.group_size=64", "--set", "calibration.seed=5"))
    assert load_recipe(str(path)) == load_recipe("gptq-w3", ["weights.group_size=64", "calibration.seed=5"])
    assert run(str(path)) == path.read_text()


def test_a_recipe_as_json() -> None:
    assert json.loads(run("gptq-w4", "--json")) == load_recipe("gptq-w4").model_dump(mode="json")


def test_the_schema() -> None:
    assert json.loads(run("--schema")) == recipe_schema()


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["--set", "weights.bits=3"], "optgptq recipes --set"),
        (["gptq-w4", "--schema"], "optgptq recipes --schema"),
        (["--schema", "--set", "weights.bits=3"], "optgptq recipes --schema"),
        (["gptq-w5"], "recipe gptq-w5"),
    ],
)
def test_what_cannot_be_obeyed(arguments: list[str], where: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(*arguments)
    assert caught.value.where == where
    assert caught.value.exit_code == 2
