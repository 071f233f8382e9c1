"""Values of files that anybody can edit, read without trust, and words for people made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from optgptq.plain_numbers import is_number

# Control characters, halves of surrogate pairs, and marks that turn the direction of text: no page shows them as meant.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_REPLACEMENT = "\ufffd"


def clean(value: object, *, limit: int = 1000) -> str:
    """Return `value` as text that can be shown and written as UTF-8, at most about `limit` characters of it."""
    text = value if isinstance(value, str) else str(value)
    if len(text) > limit:
        text = f"{text[:limit]}… ({len(text) - limit:,} characters more)"
    return showable(text)


def showable(text: str) -> str:
    """Return text without characters that no page shows as meant, or that UTF-8 does not have."""
    return _UNSHOWABLE.sub(_REPLACEMENT, text)


def number(value: object) -> float | None:
    """Return a finite number; None for everything else, booleans included."""
    return float(value) if is_number(value) else None


def drawable(value: object) -> float | None:
    """Return a number that a picture can have a scale for; None for everything else."""
    found = number(value)
    return found if found is not None and (found == 0 or 1e-30 <= abs(found) <= 1e30) else None


def whole(value: object) -> int | None:
    """Return a whole number; None for everything else."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def table_of(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object under `key`; an empty one where there is none."""
    found = source.get(key)
    return found if isinstance(found, dict) else {}


def entries(source: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the objects of the list under `key`."""
    found = source.get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def texts(source: Mapping[str, Any], key: str) -> list[str]:
    """Return the items of the list under `key` as text."""
    found = source.get(key)
    return [clean(item) for item in found] if isinstance(found, list) else []


def finite(value: Any) -> Any:
    """Return a copy of JSON-like data with infinities and NaNs as None: JSON has no spelling for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [finite(item) for item in value]
    return value


def flat(value: object, prefix: str = "") -> list[tuple[str, object]]:
    """Return nested objects as dotted names and their values, in the order of the keys; lists are values."""
    if not isinstance(value, dict):
        return [(prefix, value)]
    found: list[tuple[str, object]] = []
    for key, item in value.items():
        name = f"{prefix}.{clean(key, limit=200)}" if prefix else clean(key, limit=200)
        found += flat(item, name) if isinstance(item, dict) and item else [(name, item)]
    return found


def digits(value: object, *, precision: int = 4) -> str:
    """Return a number with so many significant digits; `-` where it is none."""
    found = number(value)
    return "-" if found is None else f"{found:.{precision}g}"


def count(value: object) -> str:
    """Return a whole number with separators: `12,345`."""
    found = number(value)
    return "-" if found is None else f"{found:,.0f}"


def percent(value: object) -> str:
    """Return a share as `12.3 %`."""
    found = number(value)
    return "-" if found is None else f"{found:.2%}".replace("%", " %")


def num_bytes(value: object) -> str:
    """Return a number of bytes with a binary unit: `1.5 GiB`."""
    size = number(value)
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def duration(value: object) -> str:
    """Return seconds as `0.8 s`, `12 s`, `3:05 min` or `1:02:03 h`."""
    seconds = number(value)
    if seconds is None:
        return "-"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def plain_value(value: object) -> str:
    """Return a value of a record for a table: `yes`, `no`, `-`, a number, a text, or JSON-like items."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return clean(", ".join(plain_value(item) for item in value)) or "none"
    return clean(value) if value != {} else "none"
