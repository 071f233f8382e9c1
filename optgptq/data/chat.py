"""Chat messages to text through the model's own Jinja template, in a sandbox.

Rendered here and not by transformers for two reasons: its import takes seconds, and templates that print today's date
would make two runs differ. Whitespace rules and helper functions are those that templates are written for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from optgptq.errors import TextError

# Any fixed day will do: calibration text, and what a seed writes, must not depend on when the command runs.
FIXED_DATE = {"%d %b %Y": "26 Jul 2024", "%Y-%m-%d": "2024-07-26", "%B %d, %Y": "July 26, 2024"}
DEFAULT_DATE = "26 Jul 2024"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Advice:
    """What to do, for each way to fail."""

    no_template: str
    no_messages: str
    refused: str


# A template is a program of the model's author: these are the ways in which such programs fail.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
FOR_CALIBRATION = _Advice(
    no_template="Set calibration.chat_template=false and name a column of plain text, or add the template.",
    no_messages="Name the column that holds the messages in calibration.column.",
    refused="Check roles and their order in the data, or use a column of plain text.",
)
FOR_GENERATION = _Advice(
    no_template="Give prompts as plain text, or add the template.",
    no_messages="Give messages as objects with role and content.",
    refused="Check the roles of the messages and their order, or give the prompt as plain text.",
)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote; the text inside is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it a set of the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML; the order of arguments is the one that templates rely on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _fixed_date(pattern: str) -> str:
    return FIXED_DATE.get(pattern, DEFAULT_DATE)


def chat_template_of(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """Return the template in `chat_template.jinja`, else the one in the tokenizer's configuration, else None.

    Raises:
        TextError: the file is not UTF-8 or cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(
                f"chat template {path}",
                expected="a UTF-8 file that can be read",
                found=str(error),
                action="Copy chat_template.jinja again from where the model came from.",
            ) from error
    stored = tokenizer_config.get("chat_template")
    if isinstance(stored, list):
        named = {entry["name"]: entry["template"] for entry in stored if isinstance(entry, dict) and "name" in entry}
        stored = named.get("default")
    return stored if isinstance(stored, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _fixed_date
    return environment


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    template: str | None,
    *,
    special_tokens: Mapping[str, str],
    folder: Path,
    add_generation_prompt: bool = False,
) -> str:
    """Return `messages` rendered by `template`.

    With `add_generation_prompt` the text ends with what the model writes its answer after; without it, which is for
    calibration, it ends with the last message.

    Raises:
        TextError: no template, messages that are no list of objects, or a template that fails on them.
    """
    advice = FOR_GENERATION if add_generation_prompt else FOR_CALIBRATION
    if template is None:
        raise TextError(
            f"chat template of {folder}",
            expected="a file chat_template.jinja, or chat_template in tokenizer_config.json",
            found="neither",
            action=advice.no_template,
        )
    well_formed = isinstance(messages, Sequence) and all(isinstance(message, Mapping) for message in messages)
    if not messages or isinstance(messages, str) or not well_formed:
        raise TextError(
            "chat messages",
            expected='a list of messages such as {"role": "user", "content": "Hello"}',
            found=repr(messages)[:80],
            action=advice.no_messages,
        )
    plain = [dict(message) for message in messages]
    try:
        compiled = _environment().from_string(template)
        rendered = compiled.render(
            messages=plain, add_generation_prompt=add_generation_prompt, tools=None, **special_tokens
        )
        return str(rendered)
    except _TEMPLATE_FAULTS as error:
        raise TextError(
            f"chat template of {folder}",
            expected="a template that accepts the messages",
            found=f"the error {str(error) or type(error).__name__!r} on {repr(plain)[:80]}",
            action=advice.refused,
        ) from error
