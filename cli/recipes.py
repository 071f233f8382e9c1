"""`optgptq recipes`: list the shipped recipes, show one with every field, print the schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import JsonOption, QuietOption
from .output import table, write_json, write_result

if TYPE_CHECKING:
    from optgptq.recipe import Recipe


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="Shipped recipe or YAML file to show in full.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Override one field, such as weights.bits=3.", show_default=False
        ),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the shipped recipes, or show one with every field written out. What is shown can be saved and edited."""
    from optgptq.errors import UsageError
    from optgptq.recipe import load_recipe, recipe_schema

    if schema and (name or overrides):
        raise UsageError(
            "optgptq recipes --schema",
            expected="nothing beside --schema",
            found=f"the recipe {name}" if name else "--set",
            action="Leave out one of the two.",
        )
    if schema:
        write_json(recipe_schema())
    elif name is not None:
        _show(load_recipe(name, overrides or ()), as_json=as_json)
    elif overrides:
        raise UsageError(
            "optgptq recipes --set",
            expected="the name of the recipe to change",
            found="no name",
            action="Write `optgptq recipes NAME --set FIELD=VALUE`.",
        )
    else:
        _list(as_json=as_json, quiet=quiet)


def _show(recipe: Recipe, *, as_json: bool) -> None:
    from optgptq.recipe import recipe_to_yaml

    if as_json:
        write_json(recipe.model_dump(mode="json"))
    else:
        write_result(recipe_to_yaml(recipe))


def _list(*, as_json: bool, quiet: bool) -> None:
    from optgptq.recipe import shipped_recipes

    shipped = shipped_recipes()
    if as_json:
        write_json({"recipes": [{"name": recipe.name, "description": recipe.description} for recipe in shipped]})
    elif quiet:
        write_result("\n".join(recipe.name for recipe in shipped))
    else:
        write_result(table([[recipe.name, recipe.description] for recipe in shipped]))
