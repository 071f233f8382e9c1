"""The recipe's JSON schema, asked three questions: what stands at a path, which values it takes, which key is meant."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any

from optgptq.recipe.records import Recipe
from optgptq.recipe.yaml_text import KeyPath

Schema = dict[str, Any]
CLOSE = 0.6


@cache
def recipe_schema() -> Schema:
    """Return the JSON schema of a recipe. It is shared: do not change it."""
    return Recipe.model_json_schema()


def _resolved(schema: Schema) -> Schema:
    if "$ref" not in schema:
        return schema
    definition: Schema = recipe_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    return definition


def schema_at(path: KeyPath) -> Schema | None:
    """Return the schema of the value at `path` (defaults and descriptions included), or None where there is none."""
    schema: Schema = recipe_schema()
    for part in path:
        inner = _resolved(schema)
        found = inner.get("items") if isinstance(part, int) else inner.get("properties", {}).get(part)
        if found is None:
            return None
        schema = found
    return schema


def keys_at(path: KeyPath) -> tuple[str, ...]:
    """Return the keys of the section at `path`, in order; empty where it is not a section."""
    schema = schema_at(path)
    return () if schema is None else tuple(_resolved(schema).get("properties", {}))


def _range(schema: Schema, noun: str) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f"{noun} from {low} to {high}"
    parts = [] if low is None else [f"of at least {low}"]
    parts += [] if high is None else [f"of at most {high}"]
    parts += [] if above is None else [f"above {above}"]
    parts += [] if below is None else [f"below {below}"]
    return " ".join([noun, " and ".join(parts)]).strip()


def _valid_text(schema: Schema) -> str:
    if "examples" in schema:
        return f"{schema['title']} such as {schema['examples'][0]}"
    if schema.get("format") == "regex":
        return "a regular expression"
    return "text that is not empty" if schema.get("minLength") else "text"


def valid_values(schema: Schema) -> str:
    """Return, in words, every value that a field takes."""
    schema = _resolved(schema)
    if "anyOf" in schema:
        return " or ".join(valid_values(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind == "object":
        return "a section with the keys " + ", ".join(schema.get("properties", {}))
    if kind == "array":
        return "a list whose items are each " + valid_values(schema["items"])
    if kind == "integer":
        return _range(schema, "a whole number")
    if kind == "number":
        return _range(schema, "a number")
    return {"boolean": "true or false", "null": "null"}.get(str(kind)) or _valid_text(schema)


def takes_only_text(path: KeyPath) -> bool:
    """Return whether the field at `path` holds text or null and nothing else."""
    schema = schema_at(path)
    if schema is None:
        return False
    options = schema.get("anyOf", [schema])
    return all(option.get("type") in ("string", "null") and "enum" not in option for option in options)


def _all_paths(path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key in keys_at(path):
        yield (*path, key)
        yield from _all_paths((*path, key))


def nearest_path(path: KeyPath) -> str:
    """Return the dotted path of the valid key that an unknown one was probably meant to be.

    A similar key of the same section first, then the same key elsewhere, then a similar key elsewhere.
    """
    section, key = path[:-1], str(path[-1])
    siblings = keys_at(section)
    close = get_close_matches(key, siblings, n=1, cutoff=CLOSE)
    if not close:
        elsewhere = {known[-1]: known for known in reversed(list(_all_paths()))}
        distant = [key] if key in elsewhere else get_close_matches(key, list(elsewhere), n=1, cutoff=CLOSE)
        if distant:
            return ".".join(elsewhere[distant[0]])
        close = get_close_matches(key, siblings, n=1, cutoff=0.0)
    return ".".join(str(part) for part in (*section, close[0]))
