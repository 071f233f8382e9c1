"""What the JSON files of a model folder say about its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optgptq.errors import TextError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder; empty where the file does not exist."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TextError(
            f"file {path}",
            expected="a JSON object",
            found=str(error),
            action=f"Copy {path.name} into {path.parent} again from where the model came from.",
        ) from error
    if not isinstance(value, dict):
        raise TextError(
            f"file {path}",
            expected="a JSON object",
            found=f"a JSON {type(value).__name__}",
            action=f"Copy {path.name} into {path.parent} again from where the model came from.",
        )
    return value


def _token_text(value: object) -> str | None:
    """Return the text of a token that configurations write as text or as `{"content": text, ...}`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def named_special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    found = {name: _token_text(config.get(name, special_map.get(name))) for name in NAMED_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def declared_tokens(config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> set[str]:
    """Return every token that the configuration declares, which transformers would add where it is missing."""
    declared = set(special_tokens.values())
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    for tokens in (extra, config.get("added_tokens_decoder") or ()):
        declared |= {_token_text(value) or "" for value in _members(tokens)}
    return declared - {""}


def _members(tokens: object) -> list[object]:
    """Return the tokens of a table or list; none where a damaged file has something else there."""
    if isinstance(tokens, dict):
        return list(tokens.values())
    return tokens if isinstance(tokens, list) else []


def token_ids(*candidates: object) -> tuple[int, ...]:
    """Return the first candidate that holds an id or a list of ids."""
    for candidate in candidates:
        ids = candidate if isinstance(candidate, list) else [candidate]
        numbers = tuple(value for value in ids if isinstance(value, int) and not isinstance(value, bool))
        if numbers:
            return numbers
    return ()
