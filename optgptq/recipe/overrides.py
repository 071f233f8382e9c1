"""`--set a.b=c`: one value written into the parsed recipe before it is validated."""

from __future__ import annotations

from typing import Any

from optgptq.errors import RecipeError
from optgptq.recipe.fields import takes_only_text
from optgptq.recipe.yaml_text import KeyPath, parse_yaml

# Longer numbers are no place in a list, and Python refuses to read very long ones.
_LONGEST_INDEX = 9


def _bad_path(override: str, *, expected: str, found: str, action: str) -> RecipeError:
    return RecipeError(f"--set {override}", expected=expected, found=found, action=action)


def _split(override: str) -> tuple[KeyPath, str]:
    name, equals, value = override.partition("=")
    parts = tuple(_part(part) for part in name.strip().split("."))
    if not equals or "" in parts:
        raise _bad_path(
            override,
            expected="a dotted field and its value, such as weights.bits=3",
            found=f"{override!r}",
            action="Write --set SECTION.FIELD=VALUE; `optgptq recipes --schema` lists all fields.",
        )
    return parts, value


def _part(text: str) -> str | int:
    return int(text) if text.isdecimal() and len(text) <= _LONGEST_INDEX else text


def _descend(container: Any, part: str | int, override: str, path: KeyPath) -> Any:
    """Return what `part` names inside `container`; a section that is not there yet is created."""
    if isinstance(container, list):
        _require_index(container, part, override, path)
        return container[int(part)]
    inner = container.get(str(part))
    if inner is None:
        inner = container[str(part)] = {}
    if not isinstance(inner, dict | list):
        name = ".".join(map(str, (*path, part)))
        raise _bad_path(
            override,
            expected=f"a section or list at {name}",
            found=f"the single value {inner!r}",
            action=f"Set {name} itself, or correct the field.",
        )
    return inner


def _require_index(container: list[Any], part: str | int, override: str, path: KeyPath) -> None:
    if not isinstance(part, int) or part >= len(container):
        raise _bad_path(
            override,
            expected=f"a number below {len(container)}: {'.'.join(map(str, path))} has {len(container)} items",
            found=f"{part!r}",
            action="Count from 0, or set the whole list: --set 'weights.keep_dense=[a, b]'.",
        )


def apply_override(recipe: dict[str, Any], overrides: dict[KeyPath, str], override: str) -> None:
    """Write `override` into `recipe` (changed in place) and note in `overrides` which paths it wrote.

    The value is YAML: a number, true, null, text, or a list in brackets. Where a field takes only text, the value is
    taken as it stands, so that a revision of digits stays text.

    Raises:
        RecipeError: no `=`, a path through something that is no section, or a value that is not YAML.
    """
    path, text = _split(override)
    value = parse_yaml(text, where=f"--set {override}").value
    if takes_only_text(path) and isinstance(value, bool | int | float):
        value = text.strip()
    container: Any = recipe
    for depth, part in enumerate(path[:-1]):
        overrides.setdefault(path[: depth + 1], override)
        container = _descend(container, part, override, path[:depth])
    last = path[-1]
    if isinstance(container, list):
        _require_index(container, last, override, path[:-1])
        container[int(last)] = value
    else:
        container[str(last)] = value
    for known in [known for known in overrides if known[: len(path)] == path]:
        del overrides[known]
    overrides[path] = override
