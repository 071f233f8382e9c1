"""YAML read with a line number for every key, and with nothing that a recipe does not need.

The YAML 1.2 core schema: `yes` and `no` are text, `1e-3` is a number, a date is text. Aliases, tags, several documents,
duplicate keys, deep nesting and large files are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import regex
import yaml

from optgptq.errors import RecipeError

LARGEST_TEXT = 256 * 1024
DEEPEST_NESTING = 12
KeyPath = tuple[str | int, ...]

NULL = regex.compile(r"~|null|Null|NULL|")
BOOL = regex.compile(r"true|True|TRUE|false|False|FALSE")
INT = regex.compile(r"[-+]?[0-9](?:_?[0-9]){0,29}")
FLOAT = regex.compile(
    r"[-+]?(?:(?:\.[0-9]{1,40}|[0-9]{1,40}\.[0-9]{0,40})(?:[eE][-+]?[0-9]{1,4})?|[0-9]{1,40}[eE][-+]?[0-9]{1,4})"
)


@dataclass(frozen=True, slots=True)
class YamlText:
    """A parsed text: plain values, and the line (from 1) where each key or list item begins."""

    value: Any
    lines: Mapping[KeyPath, int]


class _Dumper(yaml.SafeDumper):
    """Quotes what any reader, YAML 1.1 or 1.2, could take for something other than text."""


# Line breaks of Unicode: a reader would take them for the end of a line unless they are escaped in double quotes.
_UNICODE_BREAKS = ("\x85", "\u2028", "\u2029")


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = '"' if any(character in value for character in _UNICODE_BREAKS) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Dumper.add_representer(str, _represent_text)


def _refuse(where: str, line: int | None, *, expected: str, found: str, action: str) -> RecipeError:
    place = where if line is None else f"{where} line {line}"
    return RecipeError(place, expected=expected, found=found, action=action)


def _check_events(text: str, where: str) -> None:
    """Walk the flat event stream first: the tree builder below recurses, so its input must be known to be shallow."""
    depth = 0
    num_documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = None if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or (isinstance(event, yaml.NodeEvent) and event.anchor is not None):
            raise _refuse(
                where, line, expected="plain values", found="an anchor or alias", action="Write the value out in full."
            )
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            raise _refuse(where, line, expected="plain values", found=f"the tag {event.tag}", action="Remove the tag.")
        if isinstance(event, yaml.DocumentStartEvent):
            num_documents += 1
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_NESTING:
            found = f"more than {DEEPEST_NESTING} levels"
            raise _refuse(where, line, expected="a few levels of nesting", found=found, action="Flatten the text.")
        if num_documents > 1:
            raise _refuse(
                where, line, expected="one YAML document", found="a second one", action="Remove the line `---`."
            )


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text: str = node.value
    if node.style is not None:  # quoted or a block: always text
        return text
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    if INT.fullmatch(text):
        return int(text)
    return float(text) if FLOAT.fullmatch(text) else text


def _build(node: yaml.Node, path: KeyPath, where: str, lines: dict[KeyPath, int]) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[*path, index] = item.start_mark.line + 1
            items.append(_build(item, (*path, index), where, lines))
        return items
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise _refuse(where, line, expected="a word as key", found="a list or mapping", action="Use a word as key.")
        key: str = key_node.value
        if key in mapping:
            raise _refuse(
                where,
                line,
                expected="each key once",
                found=f"{'.'.join(map(str, (*path, key)))} again, first on line {lines[*path, key]}",
                action="Keep one of the two lines.",
            )
        lines[*path, key] = line
        mapping[key] = _build(value_node, (*path, key), where, lines)
    return mapping


def parse_yaml(text: str, *, where: str) -> YamlText:
    """Return the values of `text` and the line of each key; `where` begins every message.

    Raises:
        RecipeError: not YAML, or YAML that a recipe has no use for.
    """
    if len(text) > LARGEST_TEXT:
        found = f"{len(text)} characters"
        raise _refuse(
            where,
            None,
            expected=f"a recipe of at most {LARGEST_TEXT} characters",
            found=found,
            action="Check that this is the file you meant.",
        )
    lines: dict[KeyPath, int] = {}
    try:
        _check_events(text, where)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _refuse(
            where,
            None if mark is None else mark.line + 1,
            expected="valid YAML",
            found=error.problem or "something else",
            action="Correct this line; check indentation, quotes and brackets.",
        ) from error
    except yaml.YAMLError as error:
        found = str(error).splitlines()[0]
        raise _refuse(where, None, expected="valid YAML", found=found, action="Save the file as plain text.") from error
    return YamlText(None if node is None else _build(node, (), where, lines), lines)


def dump_yaml(value: Any) -> str:
    """Return block-style YAML that `parse_yaml` reads back to an equal value; key order is kept."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))
