"""Text and JSON output."""

from __future__ import annotations

import json
import math

import pytest

from optgptq_cli.output import human_bytes, human_seconds, table, write_json


def test_numbers_are_set_to_the_right_and_text_to_the_left():
    assert table([("a", "1"), ("bcd", "22.5")], header=("name", "n")) == "name     n\na        1\nbcd   22.5"
    assert table([("key", "some text"), ("longer key", "x")]) == "key         some text\nlonger key  x"
    assert table([]) == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**20, "5.0 MiB"), (3 * 2**40, "3.0 TiB")],
)
def test_bytes(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59, "59 s"), (185, "3:05"), (3723, "1:02:03")]
)
def test_seconds(seconds, text):
    assert human_seconds(seconds) == text


def test_json_has_no_infinities_and_keeps_the_order_of_its_keys(capsys):
    write_json({"b": math.inf, "a": [1.5, math.nan, {"c": (True, None)}], "ü": "é"})
    text = capsys.readouterr().out
    assert json.loads(text) == {"b": None, "a": [1.5, None, {"c": [True, None]}], "ü": "é"}
    assert text.index('"b"') < text.index('"a"')
    assert "é" in text
