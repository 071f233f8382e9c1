"""Damage to bytes and to JSON-like values, from a seeded generator: the same seed gives the same damage."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

CANARY = "secret.txt"
"""A file beside the folder that a job is given: reading it is reading outside."""

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**18, 10**400)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    " ",
    "null",
    "true",
    "-1",
    "1e999",
    "\0",
    "\ud800",
    "\udcff",
    "é\u2028\u202e",
    "a" * 300,
    "." * 40,
    ".",
    "..",
    f"../{CANARY}",
    f"sub/../../{CANARY}",
    "/etc/hostname",
    "C:\\x",
    "(a+)+$",
    "[",
    "{}",
    "%s{0}",
    "self",
    "config.json",
    "model.safetensors",
)
BYTES = (b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]" * 3, b'"', b"\n", b",", b":", b"\\u0000")
BYTES += (b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b"../", b"\r\n", b"\xe2\x80\xa8", b"- ")
BYTES += (b"&a ", b"*a", b"!!python/object:x ", b"---\n", b"{{", b"}}", b"{%", b"\t", b"#", b"'", b"|", b">", b"? ")

Path = tuple[str | int, ...]


def interesting(rng: random.Random) -> Any:
    """Return a value that programs often do not expect."""
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind in (1, 2):
        return rng.choice(NUMBERS) * rng.choice((1, 1, -1))
    if kind == 3:
        return rng.choice(FLOATS)
    if kind in (4, 5):
        return rng.choice(TEXTS)
    if kind == 6:
        return [] if rng.random() < 0.5 else [interesting(rng) for _ in range(rng.randrange(1, 4))]
    if kind == 7:
        return {} if rng.random() < 0.5 else {rng.choice(TEXTS): interesting(rng)}
    return nested(rng.choice((3, 20, 60)), rng.choice(("list", "dict")))


def nested(depth: int, kind: str) -> Any:
    """Return a list in a list in a list, or the same with objects."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def damaged_bytes(rng: random.Random, data: bytes, *, corpus: Sequence[bytes] = ()) -> bytes:
    """Return `data` with a few places changed; pieces of other inputs of the corpus are spliced in."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        data = _change_bytes(rng, data, corpus)
    return data


def _change_bytes(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    begin = rng.randrange(len(data) + 1)
    # Headers decide more than what follows them.
    if rng.random() < 0.4:
        begin = min(begin, rng.randrange(64))
    end = min(len(data), begin + rng.choice((1, 1, 2, 4, 8, 30, 300)))
    kind = rng.randrange(9)
    if kind == 0 and begin < len(data):
        return data[:begin] + bytes([data[begin] ^ (1 << rng.randrange(8))]) + data[begin + 1 :]
    if kind == 1:
        return data[:begin] + rng.randbytes(end - begin) + data[end:]
    if kind == 2:
        return data[:begin] + data[end:]
    if kind == 3:
        return data[:begin] + data[begin:end] * rng.choice((2, 2, 3, 50)) + data[end:]
    if kind == 4:
        return data[:begin]
    if kind == 5 and corpus:
        other = rng.choice(corpus)
        start = rng.randrange(len(other) + 1)
        return data[:begin] + other[start : start + rng.choice((8, 60, 500))] + data[end:]
    if kind == 6:
        return _other_number(rng, data)
    if kind == 7:
        return data[:begin] + rng.choice(BYTES) + data[end:]
    return data[:begin] + rng.choice(BYTES) + data[begin:]


def _other_number(rng: random.Random, data: bytes) -> bytes:
    places = [place for place, byte in enumerate(data[:20_000]) if 48 <= byte <= 57]
    if not places:
        return data
    begin = end = rng.choice(places)
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    return data[:begin] + str(rng.choice((*NUMBERS, *FLOATS))).encode() + data[end:]


def damaged_value(rng: random.Random, value: Any) -> Any:
    """Return a copy of a JSON-like value with a few places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        paths = list(_paths(value))
        if not paths:
            return interesting(rng)
        _change_value(rng, value, rng.choice(paths), paths)
    return value


def damaged_json(rng: random.Random, value: Any) -> bytes:
    """Return the text of a damaged value; now and then the text itself is damaged as well."""
    if rng.random() < 0.2:
        return damaged_bytes(rng, json.dumps(value, indent=2).encode())
    data = json.dumps(damaged_value(rng, value), indent=rng.choice((None, 2))).encode()
    return damaged_bytes(rng, data) if rng.random() < 0.1 else data


def _paths(value: Any, path: Path = ()) -> list[Path]:
    items: Sequence[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found: list[Path] = []
    for key, inner in items:
        found.append((*path, key))
        if len(path) < 12:
            found += _paths(inner, (*path, key))
    return found


def _change_value(rng: random.Random, root: Any, path: Path, paths: list[Path]) -> None:
    container = _at(root, path[:-1])
    key = path[-1]
    changes: tuple[Callable[[], None], ...] = (
        lambda: _set(container, key, interesting(rng)),
        lambda: _set(container, key, interesting(rng)),
        lambda: _set(container, key, _near(rng, container[key])),
        lambda: _set(container, key, _near(rng, container[key])),
        lambda: container.__delitem__(key),
        lambda: _set(container, key, copy.deepcopy(_at(root, rng.choice(paths)))),
        lambda: _set(container, key, [container[key]]),
        lambda: _rename(rng, container, key, paths),
    )
    rng.choice(changes)()


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _set(container: Any, key: str | int, value: Any) -> None:
    container[key] = value


def _rename(rng: random.Random, container: Any, key: str | int, paths: list[Path]) -> None:
    if isinstance(container, list):
        container.insert(int(key), interesting(rng))
        return
    names = [str(path[-1]) for path in paths]
    container[rng.choice((*names, *TEXTS))] = container.pop(key)


def _near(rng: random.Random, value: Any) -> Any:
    """Return something of the same kind as `value`, but another one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        as_float = float(value) if abs(value) < 10**300 else float("inf")
        return rng.choice((value + 1, value - 1, -value, value * 2, value // 2, value * 10**6, as_float))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e30, value / 1e30, 0.0, float("nan"), str(value)))
    if isinstance(value, str):
        place = rng.randrange(len(value) + 1)
        pieces = (value[:place], value[:place] + rng.choice(TEXTS) + value[place:], value * 3, value.upper(), [value])
        return rng.choice(pieces)
    if isinstance(value, list):
        return rng.choice((value[:-1], value + value, value[::-1], [[*value]], {"0": value}))
    if isinstance(value, dict):
        return rng.choice((list(value), list(value.values()), {**value, rng.choice(TEXTS): interesting(rng)}))
    return interesting(rng)
