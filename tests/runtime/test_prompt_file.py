"""Files of prompts: what is read, and how each wrong line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optgptq.errors import TextError
from optgptq.runtime.prompt_file import read_prompts
from optgptq.scheduling.sampling_params import SamplingParams

VALUES = {"max_tokens": 9, "temperature": 0.0}
MESSAGES = [{"role": "user", "content": "Hello"}]


def write(folder: Path, *rows: Any, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
    return path


def test_each_line_of_text_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffOne\r\n\n  \nTwo\u2028still two\n Three ".encode())
    requests = read_prompts(path, VALUES)
    assert [request.text for request in requests] == ["One", "Two\u2028still two", " Three "]
    assert [request.where for request in requests] == [f"text {path} line {number}" for number in (1, 4, 5)]
    assert {request.params for request in requests} == {SamplingParams(max_tokens=9, temperature=0.0)}


def test_lines_of_json_have_parameters_of_their_own(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "One", "id": "a", "max_tokens": 3, "stop": ["."], "logit_bias": {"7": 2.0}},
        "",
        {"prompt_token_ids": [4, 5], "id": 7},
        {"messages": MESSAGES, "prompt": None, "temperature": 0.5},
    )
    first, second, third = read_prompts(path, VALUES)
    assert (first.text, first.name) == ("One", "a")
    assert first.params == SamplingParams(max_tokens=3, temperature=0.0, stop=["."], logit_bias={7: 2.0})
    assert (second.token_ids, second.name, second.text) == ((4, 5), 7, None)
    assert (third.messages, third.params.temperature, third.params.max_tokens) == (MESSAGES, 0.5, 9)
    assert third.where == f"text {path} line 4"


@pytest.mark.parametrize(
    ("row", "where", "expected", "found"),
    [
        ("{", "", "one JSON object per line", "Expecting property name"),
        ("[1]", "", "one JSON object per line", "a JSON list"),
        ("[" * 100_000, "", "one JSON object per line", "maximum recursion depth"),
        ({"id": 1}, "", "one of prompt, prompt_token_ids, messages", "none of them"),
        ({"prompt": "x", "messages": MESSAGES}, "", "one of prompt, prompt", "prompt and messages"),
        ({"prompt": "x", "max_token": 3}, "", "a known name; the nearest is max_tokens", "'max_token'"),
        ({"prompt": "x", "temperature": -1}, ", temperature", "a finite number, 0 or more", "-1"),
        ({"prompt": "x", "logits_processors": []}, "", "a known name", "'logits_processors'"),
        ('{"prompt": "x", "top_p": NaN}', ", top_p", "a number above 0 and at most 1", "nan"),
        ({"prompt": 3}, ", prompt", "text", "3"),
        ({"prompt_token_ids": [1, True]}, ", prompt_token_ids", "a list of whole numbers", "[1, True]"),
        ({"prompt_token_ids": "12"}, ", prompt_token_ids", "a list of whole numbers", "'12'"),
        ({"messages": []}, ", messages", "a list of messages such as", "[]"),
        ({"messages": ["hello"]}, ", messages", "a list of messages such as", "['hello']"),
        ({"prompt": "x", "id": [1]}, ", id", "text or a whole number", "[1]"),
        ('{"prompt": "\\ud800"}', "", "text that UTF-8 can hold", "half of a surrogate pair"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, row: Any, where: str, expected: str, found: str) -> None:
    path = write(tmp_path, {"prompt": "good"}, row)
    with pytest.raises(TextError) as caught:
        read_prompts(path, VALUES)
    assert caught.value.where == f"text {path} line 2{where}"
    assert caught.value.expected.startswith(expected)
    assert caught.value.found.startswith(found)
    assert caught.value.action.endswith(".")


def test_a_file_that_is_no_file_of_prompts(tmp_path: Path) -> None:
    for name, expected in [("p.csv", ".txt or .jsonl"), ("p.txt", "a file that can be read")]:
        with pytest.raises(TextError, match=expected):
            read_prompts(tmp_path / name, VALUES)
    with pytest.raises(TextError, match="blank lines only"):
        read_prompts(write(tmp_path, "", " ", name="p.txt"), VALUES)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TextError, match="byte 0xe9 at offset 3"):
        read_prompts(tmp_path / "latin.txt", VALUES)
