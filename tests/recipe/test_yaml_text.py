from __future__ import annotations

from typing import Any

import pytest

from optgptq.errors import RecipeError
from optgptq.recipe.yaml_text import dump_yaml, parse_yaml


def parse(text: str) -> Any:
    return parse_yaml(text, where="job.yaml").value


def failure(text: str) -> tuple[str, str, str]:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    return caught.value.where, caught.value.expected, caught.value.found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("on", "on"),
        ("null", None),
        ("~", None),
        ("", None),
        ("12", 12),
        ("-1", -1),
        ("5_000_000_000", 5_000_000_000),
        ("0x10", "0x10"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e-3", 0.001),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", ".inf"),
        ("'12'", "12"),
        ('"true"', "true"),
        ("bundled:story-calibration", "bundled:story-calibration"),
        ("[a, 1, true]", ["a", 1, True]),
        ("9" * 31, "9" * 31),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
    ],
)
def test_values(text: str, value: object) -> None:
    parsed = parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_lines_of_keys_and_items() -> None:
    text = "a: 1\n\nb:\n  c: 2\n  d:\n  - x\n  - e: 3\n"
    assert parse_yaml(text, where="").lines == {
        ("a",): 1,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "d"): 5,
        ("b", "d", 0): 6,
        ("b", "d", 1): 7,
        ("b", "d", 1, "e"): 7,
    }


def test_duplicate_keys_name_both_lines() -> None:
    assert failure("weights:\n  bits: 3\n  bits: 4\n") == (
        "job.yaml line 3",
        "each key once",
        "weights.bits again, first on line 2",
    )


@pytest.mark.parametrize(
    ("text", "where", "expected", "found"),
    [
        ("a: &x 1\nb: *x\n", "job.yaml line 1", "plain values", "an anchor or alias"),
        (
            "a: !!python/name:os.system\n",
            "job.yaml line 1",
            "plain values",
            "the tag tag:yaml.org,2002:python/name:os.system",
        ),
        ("a: !!str 3\n", "job.yaml line 1", "plain values", "the tag tag:yaml.org,2002:str"),
        ("a: 1\n---\nb: 2\n", "job.yaml line 2", "one YAML document", "a second one"),
        ("[" * 5000, "job.yaml line 1", "a few levels of nesting", "more than 12 levels"),
        ("? [a]\n: 1\n", "job.yaml line 1", "a word as key", "a list or mapping"),
        ("a: 'open\n", "job.yaml line 2", "valid YAML", "found unexpected end of stream"),
        ("a: 1\n\tb: 2\n", "job.yaml line 2", "valid YAML", "found character '\\t' that cannot start any token"),
        ("a: \x07", "job.yaml", "valid YAML", "unacceptable character #x0007: special characters are not allowed"),
        ("x" * 300_000, "job.yaml", "a recipe of at most 262144 characters", "300000 characters"),
    ],
)
def test_what_a_recipe_has_no_use_for(text: str, where: str, expected: str, found: str) -> None:
    assert failure(text) == (where, expected, found)


@pytest.mark.parametrize("text", ["yes", "1e3", "12", "2024-01-01", "~", "", "a\nb", "é", "# no comment", "1_0"])
def test_text_is_written_so_that_it_stays_text(text: str) -> None:
    assert parse(dump_yaml({"a": text})) == {"a": text}


def test_written_yaml_keeps_the_order_of_keys() -> None:
    assert dump_yaml({"b": 1, "a": [True, None]}) == "b: 1\na:\n- true\n- null\n"
