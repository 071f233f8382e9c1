"""`NAME=VALUE` into fields of settings: the border where text of users becomes typed values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from optgptq.errors import UsageError
from optgptq.recipe.yaml_text import parse_yaml
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.scheduling.sampling_params import SamplingParams

# Functions cannot be written as text.
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams) if field.name != "logits_processors")
SETTING_FIELDS = tuple(field.name for field in fields(EngineSettings))

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def field_values(assignments: Sequence[str], names: Sequence[str], *, option: str) -> dict[str, Any]:
    """Return the values of `NAME=VALUE` texts by name; a value is YAML, and the last one of a name counts.

    Args:
        assignments: the texts.
        names: of the fields that can be set.
        option: of the command line, for messages.

    Raises:
        UsageError: no `=`, a name that is none of `names`, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        where = f"{option} {assignment}"
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals:
            raise UsageError(where, expected="NAME=VALUE", found=repr(assignment), action=f"Write {option} NAME=VALUE.")
        check_name(name, names, where=where)
        values[name] = parse_yaml(text, where=where).value
    return values


def check_name(name: str, names: Sequence[str], *, where: str) -> None:
    """Raise UsageError if `name` is none of `names`; the message has the nearest one and all of them."""
    if name in names:
        return
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    raise UsageError(
        where,
        expected=f"a known name; the nearest is {close[0]}" if close else "a known name",
        found=repr(name),
        action=f"Use one of {', '.join(names)}.",
    )


def engine_settings(values: Mapping[str, Any]) -> EngineSettings:
    """Return the settings with these values by name.

    Raises:
        UsageError: a value of the wrong type, or out of range.
    """
    hints = get_type_hints(EngineSettings)
    # YAML takes bits for a number, and the mode `off` for false.
    values = {name: str(value) if hints[name] is str and _is(value, int) else value for name, value in values.items()}
    if values.get("past_only") is False:
        values["past_only"] = "off"
    for name, value in values.items():
        kinds = _kinds(hints[name])
        if not any(_is(value, kind) for kind in kinds):
            raise UsageError(
                name,
                expected=" or ".join(_WORDS[kind] for kind in kinds),
                found=repr(value),
                action="Change this setting of the engine, or leave it out.",
            )
    return EngineSettings(**values)


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """Return the parameters with these values by name; keys of `logit_bias` may be text, as they are in JSON.

    Raises:
        UsageError: a value of the wrong type, or out of range.
    """
    bias = values.get("logit_bias")
    if not isinstance(bias, Mapping):
        return SamplingParams(**values)
    return SamplingParams(**{**values, "logit_bias": {_token(key): value for key, value in bias.items()}})


def _token(key: object) -> object:
    # No token has a number of 20 digits, and Python refuses to read very long ones.
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key


def _kinds(hint: Any) -> tuple[type, ...]:
    return get_args(hint) if get_origin(hint) is UnionType else (hint,)


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
