"""Files of prompts: text with one prompt on each line, or JSON lines with parameters of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optgptq.data.rows import read_jsonl, read_text
from optgptq.errors import TextError, UsageError
from optgptq.runtime.field_values import SAMPLING_FIELDS, check_name, sampling_params
from optgptq.runtime.prompts import PromptRequest, require_unicode

PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")
LINE_FIELDS = (*PROMPT_FIELDS, "id", *SAMPLING_FIELDS)


def read_prompts(path: Path, values: Mapping[str, Any]) -> list[PromptRequest]:
    """Return the prompts of a file, in order; blank lines are passed over.

    Args:
        path: `.txt`: each line is a prompt. `.jsonl`: each line is an object with one of `prompt` (text),
            `prompt_token_ids` and `messages`, and with `id` and fields of `SamplingParams` as wanted.
        values: fields of `SamplingParams` for prompts that do not say otherwise.

    Raises:
        TextError: not readable, of another type, no prompt in it, or a line that is wrong (the message has its number).
        UsageError: a value that is wrong.
    """
    if path.suffix == ".jsonl":
        # Read to its end first, so that the file is closed whatever is wrong with a line.
        rows = list(read_jsonl(path))
        requests = [_request(where, row, values) for where, row in rows]
    elif path.suffix == ".txt":
        # Not splitlines(), for which other characters end lines too.
        lines = read_text(path).removeprefix("\ufeff").split("\n")
        params = sampling_params(values)
        requests = [
            PromptRequest(where=f"text {path} line {number}", text=line.removesuffix("\r"), params=params)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    else:
        raise TextError(
            f"text {path}",
            expected="a file whose name ends with .txt or .jsonl",
            found=path.suffix or "no ending",
            action="Rename the file, or write the prompts as one of these.",
        )
    if not requests:
        raise TextError(f"text {path}", expected="a prompt", found="blank lines only", action="Write prompts into it.")
    return requests


def _request(where: str, row: Mapping[str, Any], values: Mapping[str, Any]) -> PromptRequest:
    require_unicode(json.dumps(row, ensure_ascii=False), where)
    given = [name for name in PROMPT_FIELDS if row.get(name) is not None]
    if len(given) != 1:
        raise _bad_line(where, f"one of {', '.join(PROMPT_FIELDS)}", " and ".join(given) or "none of them")
    try:
        for name in row:
            check_name(name, LINE_FIELDS, where=where)
        own = {name: row[name] for name in SAMPLING_FIELDS if name in row}
        params = sampling_params({**values, **own})
    except UsageError as error:
        place = error.where if error.where == where else f"{where}, {error.where}"
        raise TextError(place, expected=error.expected, found=error.found, action=error.action) from error
    return PromptRequest(
        where=where,
        params=params,
        text=_text(where, row.get("prompt")),
        token_ids=_token_ids(where, row.get("prompt_token_ids")),
        messages=_messages(where, row.get("messages")),
        name=_name(where, row.get("id")),
    )


def _text(where: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise _bad_line(f"{where}, prompt", "text", repr(value)[:80])


def _token_ids(where: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    raise _bad_line(f"{where}, prompt_token_ids", "a list of whole numbers", repr(value)[:80])


def _messages(where: str, value: object) -> list[Mapping[str, Any]] | None:
    if value is None:
        return None
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return value
    expected = 'a list of messages such as {"role": "user", "content": "Hello"}'
    raise _bad_line(f"{where}, messages", expected, repr(value)[:80])


def _name(where: str, value: object) -> str | int | None:
    if value is None or isinstance(value, str) or type(value) is int:
        return value
    raise _bad_line(f"{where}, id", "text or a whole number", repr(value)[:80])


def _bad_line(where: str, expected: str, found: str) -> TextError:
    return TextError(where, expected=expected, found=found, action="Correct or remove this line.")
