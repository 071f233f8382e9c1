"""Foreign values become words that can be shown."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from optgptq.reports.wording import (
    clean,
    count,
    digits,
    duration,
    finite,
    flat,
    num_bytes,
    number,
    percent,
    plain_value,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda items: st.lists(items, max_size=4) | st.dictionaries(st.text(st.characters()), items, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_every_value_has_words(value: object) -> None:
    for show in (clean, count, digits, duration, num_bytes, percent, plain_value):
        text = show(value)
        assert isinstance(text, str)
        text.encode()
        assert "\x00" not in text
    for name, item in flat(value):
        name.encode()
        plain_value(item)
    json.dumps(finite(value), allow_nan=False)


def test_numbers() -> None:
    assert [number(value) for value in (1, 2.5, True, "3", None, float("nan"), 10**400)] == [1, 2.5, *[None] * 5]
    assert [duration(value) for value in (0, 9.94, 59.4, 59.6, 3661)] == [
        "0.0 s",
        "9.9 s",
        "59 s",
        "1:00 min",
        "1:01:01 h",
    ]
    assert [num_bytes(value) for value in (0, 1023, 1536, 5 * 2**40)] == ["0 B", "1023 B", "1.5 KiB", "5.0 TiB"]
    assert (percent(0.12345), count(1234567), digits(0.000123456)) == ("12.35 %", "1,234,567", "0.0001235")


def test_long_text_is_cut_and_says_so() -> None:
    assert clean("x" * 1200) == "x" * 1000 + "… (200 characters more)"


def test_nested_objects_become_dotted_names() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [1]}) == [("a.b", 1), ("a.c", {}), ("d", [1])]
