"""What pydantic found wrong, told in the four parts of our errors: place, valid values, what stands there, advice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from optgptq.errors import RecipeError
from optgptq.recipe.fields import keys_at, nearest_path, schema_at, valid_values
from optgptq.recipe.yaml_text import KeyPath

LONGEST_FOUND = 100


@dataclass(frozen=True, slots=True)
class Places:
    """Where each value came from.

    Attributes:
        name: the file or recipe.
        lines: line of each key in it.
        overrides: the `--set` text that last wrote each path.
    """

    name: str
    lines: Mapping[KeyPath, int]
    overrides: Mapping[KeyPath, str]

    def of(self, path: KeyPath) -> str:
        """Return the most exact place known for `path`: an override, a line, or the recipe's name."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overrides:
                return f"--set {self.overrides[path[:length]]}"
            if path[:length] in self.lines:
                return f"{self.name} line {self.lines[path[:length]]}"
        return self.name

    def order(self, path: KeyPath) -> int:
        """Return a number by which problems are sorted: those of the file first, from top to bottom."""
        return next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 1 << 30)


def dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def describe_value(value: object) -> str:
    """Return a value as a message shows it: text in quotes, `true` and `null` as YAML spells them, and never long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section with the keys " + ", ".join(map(str, value)) if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)} item{'' if len(value) == 1 else 's'}"
    text = f"the text {value!r}" if isinstance(value, str) else str(value)
    return text if len(text) <= LONGEST_FOUND else text[:LONGEST_FOUND] + "..."


def _field_path(location: tuple[int | str, ...]) -> KeyPath:
    """Return the part of pydantic's location that names keys of the recipe; what follows names members of a union."""
    path: KeyPath = ()
    for part in location:
        if schema_at((*path, part)) is None:
            break
        path = (*path, part)
    return path


def _unknown_key(path: KeyPath, places: Places) -> RecipeError:
    section = f"of {dotted(path[:-1])}" if len(path) > 1 else "at the top level"
    return RecipeError(
        f"{places.of(path)}, {dotted(path)}",
        expected=f"a known key; the nearest is {nearest_path(path)}",
        found=f"the unknown key {path[-1]!r}",
        action=f"Rename or remove it. Valid keys {section}: {', '.join(keys_at(path[:-1]))}.",
    )


def _advice(path: KeyPath, schema: Mapping[str, Any], value: object) -> str:
    choices = [str(choice) for choice in schema.get("enum", ())]
    close = get_close_matches(str(value), choices, n=1) if isinstance(value, str) else []
    if close:
        return f"Did you mean {close[0]}?"
    if "default" in schema and not isinstance(schema["default"], dict):
        default = describe_value(schema["default"]) if schema["default"] != [] else "an empty list"
        return f"Write a valid value, or remove the key to get the default, {default}."
    return f"Write a valid value for {dotted(path)}."


def _wrong_value(path: KeyPath, detail: Mapping[str, Any], places: Places) -> RecipeError:
    schema = schema_at(path) or {}
    found = describe_value(detail["input"])
    if detail["type"] == "bad_pattern":
        found = detail["ctx"]["problem"]
    where = f"{places.of(path)}, {dotted(path)}" if path else places.of(path)
    return RecipeError(where, expected=valid_values(schema), found=found, action=_advice(path, schema, detail["input"]))


def _missing_key(path: KeyPath, places: Places) -> RecipeError:
    return RecipeError(
        f"{places.of(path)}, {dotted(path)}",
        expected=valid_values(schema_at(path) or {}),
        found="no such key",
        action=f"Add the key {path[-1]} to {dotted(path[:-1])}.",
    )


def _problem(detail: Mapping[str, Any], places: Places) -> RecipeError:
    path = _field_path(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return _unknown_key(detail["loc"], places)
    if detail["type"] == "missing":
        return _missing_key(path, places)
    if detail["type"] == "impossible_combination":
        parts = detail["ctx"]
        path = (*path, parts["field"])
        return RecipeError(
            f"{places.of(path)}, {dotted(path)}",
            expected=parts["expected"],
            found=parts["found"],
            action=parts["action"],
        )
    return _wrong_value(path, detail, places)


def recipe_error(error: ValidationError, places: Places) -> RecipeError:
    """Return the first problem in reading order; the advice says how many more there are."""
    details = sorted(error.errors(include_url=False), key=lambda detail: places.order(detail["loc"]))
    first = _problem(details[0], places)
    # A union reports once per member, so problems are counted by place.
    num_more = len({_problem(detail, places).where for detail in details} - {first.where})
    if num_more == 0:
        return first
    more = f" The recipe has {num_more} more problem{'s' if num_more > 1 else ''}."
    return RecipeError(first.where, expected=first.expected, found=first.found, action=first.action + more)
