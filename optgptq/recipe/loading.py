"""YAML to record and back: shipped recipes, recipe files, `--set` overrides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from optgptq.bundled import configs_folder
from optgptq.errors import RecipeError
from optgptq.recipe.fields import recipe_schema
from optgptq.recipe.overrides import apply_override
from optgptq.recipe.problems import Places, describe_value, recipe_error
from optgptq.recipe.records import Recipe
from optgptq.recipe.sources import source_for_record
from optgptq.recipe.yaml_text import KeyPath, dump_yaml, parse_yaml

__all__ = [
    "ShippedRecipe",
    "load_recipe",
    "recipe_for_record",
    "recipe_schema",
    "recipe_to_yaml",
    "shipped_recipes",
]

SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class ShippedRecipe:
    """A recipe that travels with the package."""

    name: str
    description: str
    path: Path


def _recipes_folder() -> Path:
    return configs_folder() / "recipes"


def _shipped_names() -> list[str]:
    return sorted(path.stem for path in _recipes_folder().glob("*.yaml"))


def shipped_recipes() -> tuple[ShippedRecipe, ...]:
    """Return the shipped recipes, by name."""
    paths = [_recipes_folder() / f"{name}.yaml" for name in _shipped_names()]
    return tuple(ShippedRecipe(path.stem, load_recipe(path.stem).description, path) for path in paths)


def _find(name_or_path: str) -> tuple[str, Path]:
    """Return what messages call the recipe, and its file."""
    names = _shipped_names()
    if name_or_path in names:
        return f"recipe {name_or_path}", _recipes_folder() / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.suffix.lower() in SUFFIXES or os.path.isfile(path):
        return name_or_path, path
    close = get_close_matches(name_or_path, names, n=1)
    advice = f"Did you mean {close[0]}?" if close else "`optgptq recipes` describes them."
    raise RecipeError(
        f"recipe {name_or_path}",
        expected=f"a shipped recipe ({', '.join(names)}) or a file ending in .yaml, .yml or .json",
        found=f"{name_or_path!r}",
        action=advice,
    )


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise RecipeError(
            f"recipe {path}",
            expected="a file that can be read",
            found=(error.strerror or "an error").lower(),
            action="Check the path, or name a shipped recipe: " + ", ".join(_shipped_names()) + ".",
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe {path}",
            expected="UTF-8 text",
            found=f"byte {error.object[error.start]:#04x} at offset {error.start}",
            action="Save the recipe as UTF-8.",
        ) from error


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of this name or file, with `--set` texts such as `weights.bits=3` applied in order.

    A shipped name wins over a file of the same name; write `./name` for the file.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key, a wrong value, or values that exclude each other.
    """
    name, path = _find(name_or_path)
    document = parse_yaml(_read(path), where=name)
    values: Any = {} if document.value is None else document.value
    if not isinstance(values, dict):
        raise RecipeError(
            name,
            expected="sections and fields, such as `weights:` followed by indented fields",
            found=describe_value(values),
            action="Compare with `optgptq recipes gptq-w4`.",
        )
    written: dict[KeyPath, str] = {}
    for override in overrides:
        apply_override(values, written, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise recipe_error(error, Places(name, document.lines, written)) from error


def _plain(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    rules = [rule.model_dump(mode="json", exclude_none=True) for rule in recipe.weights.rules]
    values["weights"]["rules"] = rules
    return values


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return YAML with every field written out; loading it gives an equal recipe."""
    return dump_yaml(_plain(recipe))


def recipe_for_record(recipe: Recipe) -> dict[str, Any]:
    """Return every field as plain values for a record that travels: a local source is cut down to its file name."""
    values = _plain(recipe)
    values["calibration"]["source"] = source_for_record(recipe.calibration.source)
    if recipe.gqa.text is not None:
        values["gqa"]["text"] = source_for_record(recipe.gqa.text)
    if recipe.gates.text is not None:
        values["gates"]["text"] = source_for_record(recipe.gates.text)
    return values
