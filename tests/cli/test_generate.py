"""`optgptq generate` on the bundled model: prompts, files, streams, refusals, and a request to stop."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optgptq.bundled import bundled_path
from optgptq_cli.lines import LineWriter, line_writer
from optgptq_cli.main import main
from optgptq_cli.requests import read_requests, wants_stream

STORY = "bundled:story-llama"
SHORT = ["--max-tokens", "8", "--set", "max_running=8", "--quiet"]
CHAT = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def run(capsys, *arguments: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["generate", *arguments]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def texts(capsys, *arguments: str, code: int = 0) -> list[dict]:
    out, _ = run(capsys, *arguments, *SHORT, "--json", code=code)
    return json.loads(out)["texts"]


def write_prompts(folder: Path, *rows: dict) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    content = path.read_text()
    assert content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(bundled_path("story-llama"), folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def test_json_has_the_fields_of_the_contract(capsys):
    out, err = run(capsys, STORY, "Once upon", *SHORT, "--json")
    result = json.loads(out)
    assert set(result) == {"texts", "num_tokens", "seconds", "tokens_per_second"}
    (text,) = result["texts"]
    assert {**text, "text": "", "token_ids": []} == {
        "id": 1,
        "prompt": "Once upon",
        "num_prompt_tokens": text["num_prompt_tokens"],
        "index": 0,
        "text": "",
        "token_ids": [],
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert result["num_tokens"] == len(text["token_ids"]) == 8
    assert err == ""


def test_options_reach_the_sampler(capsys):
    (plain,) = texts(capsys, STORY, "Once upon a time")
    (stopped,) = texts(capsys, STORY, "Once upon a time", "--stop", "zzz", "--stop", "there")
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", "there")
    assert plain["text"].startswith(stopped["text"] + "there")
    (kept,) = texts(capsys, STORY, "Once upon a time", "--stop", "there", "--param", "include_stop_str_in_output=true")
    assert kept["text"] == stopped["text"] + "there"
    (bare,) = texts(capsys, STORY, "Once upon a time", "--param", "detokenize=false", "--logprobs", "2")
    assert (bare["text"], bare["token_ids"]) == ("", plain["token_ids"])
    assert [len(entry) in (2, 3) for entry in bare["logprobs"]] == [True] * 8
    assert str(plain["token_ids"][0]) in bare["logprobs"][0]
    penalties = ["--repetition-penalty", "1.9", "--presence-penalty", "2", "--frequency-penalty", "2"]
    (varied,) = texts(capsys, STORY, "Once upon a time", *penalties, "--max-tokens", "40")
    assert len(set(varied["token_ids"])) == len(varied["token_ids"])
    (longer,) = texts(capsys, STORY, "Once upon a time", "--stop", "there", "--min-tokens", "7")
    assert longer["token_ids"] == plain["token_ids"]


def test_keys_and_values_in_few_bits(capsys):
    ask = ["generate", "bundled:story-llama", "Once upon a time", "--max-tokens", "8", "--set", "max_length=64"]
    assert main([*ask, "--kv-cache", "8", "--past-only", "window:16"]) == 0
    captured = capsys.readouterr()
    assert "9.00 bits per number of keys, 9.00 of values, past-only window:16" in captured.err
    text = captured.out
    assert main([*ask, "--kv-cache", "16", "--quiet"]) == 0
    assert capsys.readouterr() == (text, "")
    assert main([*ask, "--kv-cache", "9"]) == 2
    assert "one of checkpoint, 16, 8, 4, 3, 2" in capsys.readouterr().err
    assert main([*ask, "--kv-cache", "4", "--past-only", "recent:3"]) == 2
    assert "window:N" in capsys.readouterr().err


def test_several_texts_of_a_prompt_are_apart_and_can_be_had_again(capsys):
    arguments = [STORY, "Tom", "Lily", "-n", "3", "--temperature", "1", "--min-p", "0.01", "--seed", "5"]
    entries = texts(capsys, *arguments)
    assert [(entry["prompt"], entry["index"]) for entry in entries] == [
        (prompt, index) for prompt in ("Tom", "Lily") for index in range(3)
    ]
    assert len({entry["text"] for entry in entries}) > 3
    assert texts(capsys, *arguments, "--deterministic") == texts(capsys, *arguments, "--deterministic")
    assert texts(capsys, STORY, "Lily", *arguments[3:])[0]["text"] == entries[3]["text"]


def test_people_get_prompt_and_text(capsys):
    out, _ = run(capsys, STORY, "Tom", "Lily", *SHORT)
    first, second = out.split("\n\n")
    assert first.startswith("Tom")
    assert second.startswith("Lily")
    streamed, _ = run(capsys, STORY, "Tom", *SHORT, "--stream")
    assert streamed == first + "\n"
    nothing, err = run(capsys, STORY, "x " * 3000, *SHORT, "--stream", code=2)
    assert nothing == ""
    assert "error: prompt 1\n" in err


def test_one_text_on_a_terminal_is_streamed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    values = {"max_tokens": 3, "n": 1}
    one = read_requests(["Tom"], None, values, chat=False, system=None)
    assert wants_stream(None, one, as_json=False)
    assert not wants_stream(False, one, as_json=False)
    assert not wants_stream(None, one, as_json=True)
    assert not wants_stream(None, [*one, *one], as_json=False)
    assert not wants_stream(None, read_requests([], None, {**values, "n": 2}, chat=False, system=None), as_json=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not wants_stream(None, one, as_json=False)
    assert wants_stream(True, one, as_json=False)


def test_a_chat_is_answered(capsys, chat_model):
    model = str(chat_model)
    (answer,) = texts(capsys, model, "Hello", "--chat", "--system", "Be brief.")
    (same,) = texts(capsys, model, "system: Be brief.\nuser: Hello\nassistant:", "--no-bos")
    assert answer["token_ids"] == same["token_ids"]
    assert answer["prompt"] == "Hello"
    out, _ = run(capsys, model, "Hello", "--chat", "--system", "Be brief.", *SHORT)
    assert out == answer["text"] + "\n"
    (refused,) = texts(capsys, STORY, "Hello", "--chat", code=3)
    assert refused["error"]["action"] == "Give prompts as plain text, or add the template."


def test_a_file_of_prompts_and_a_file_of_texts(tmp_path, capsys, chat_model):
    messages = [{"role": "user", "content": "Hello"}]
    prompts = write_prompts(
        tmp_path,
        {"prompt": "Once upon", "id": "a", "max_tokens": 3},
        {"prompt_token_ids": [0, 5], "n": 2, "temperature": 1.0},
        {"messages": messages},
    )
    output = tmp_path / "texts.jsonl"
    out, err = run(capsys, str(chat_model), "--prompts", str(prompts), "-o", str(output), "--max-tokens", "8")
    assert out.startswith(f"{output}: 4 texts, 27 tokens in ")
    assert "for keys and values" in err
    lines = read_lines(output)
    # As each prompt is done: the short one first.
    assert lines[0]["id"] == "a"
    by_place = {(line["id"], line["index"]): line for line in lines}
    assert set(by_place) == {("a", 0), (2, 0), (2, 1), (3, 0)}
    assert len(by_place["a", 0]["token_ids"]) == 3
    assert by_place[2, 0]["prompt"] is None
    assert by_place[2, 0]["num_prompt_tokens"] == 2
    (chat,) = texts(capsys, str(chat_model), "Hello", "--chat")
    assert by_place[3, 0]["text"] == chat["text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "texts.jsonl"]


def test_an_output_that_exists_stays_unless_it_may_go(tmp_path, capsys):
    output = tmp_path / "texts.jsonl"
    output.write_text("precious\n")
    _, err = run(capsys, STORY, "Tom", *SHORT, "-o", str(output), code=3)
    assert "--overwrite" in err
    assert output.read_text() == "precious\n"
    run(capsys, STORY, "Tom", *SHORT, "-o", str(output), "--overwrite")
    assert [line["prompt"] for line in read_lines(output)] == ["Tom"]


def test_a_request_that_fails_stops_no_other(tmp_path, capsys):
    prompts = write_prompts(
        tmp_path, {"prompt": "Tom"}, {"prompt": "x " * 3000}, {"prompt_token_ids": [5000]}, {"prompt": "Lily"}
    )
    output = tmp_path / "texts.jsonl"
    out, err = run(capsys, STORY, "--prompts", str(prompts), *SHORT, "--json", "-o", str(output), code=2)
    entries = json.loads(out)["texts"]
    assert ["error" in entry for entry in entries] == [False, True, True, False]
    assert entries[1]["error"]["kind"] == "UsageError"
    assert entries[1]["error"]["where"] == f"text {prompts} line 2"
    assert entries[1]["finish_reason"] == "error"
    assert all(len(entries[number]["token_ids"]) == 8 for number in (0, 3))
    assert json.loads(err.splitlines()[-1])["error"]["where"] == f"text {prompts} line 2"
    assert f"text {prompts} line 3" in err
    assert sorted(line["id"] for line in read_lines(output)) == [1, 2, 3, 4]
    out, err = run(capsys, STORY, "x " * 3000, "Tom", *SHORT, code=2)
    assert out.startswith("Tom")
    assert "error: prompt 1\n" in err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--prompts", "/no/such.txt"], 3, "/no/such.txt"),
        (["--prompts", "p.csv"], 3, ".txt or .jsonl"),
        (["--prompts", "BAD"], 3, "line 2"),
        (["Tom", "--prompts", "BAD"], 2, "found:    both"),
        (["Tom", "--system", "Be brief."], 2, "Add --chat."),
        (["Tom", "Lily", "--stream"], 2, "found:    2 texts"),
        (["Tom", "--stream", "--json"], 2, "--output has each text"),
        (["Tom", "--logprobs", "2"], 2, "Add --json, or --output FILE."),
        (["Tom", "--param", "logprobs=0", "--stream"], 2, "printed text has no logprobs"),
        (["Tom", "--set", "max_runing=3"], 2, "the nearest is max_running"),
        (["Tom", "--set", "page_size=7"], 2, "a multiple of 8"),
        (["Tom", "--set", "page_size=big"], 2, "a whole number"),
        (["Tom", "--param", "top_z=1"], 2, "the nearest is top_"),
        (["Tom", "--param", "top_p=2"], 2, "top_p"),
        (["Tom", "--output", "/no/such/folder/x.jsonl"], 3, "--output /no/such/folder/x.jsonl"),
        (["Tom", "--dtype", "int8"], 2, "bfloat16"),
        (["Tom\udc80"], 3, "prompt 1"),
        (["Tom", "--set", "max_length=4000", "--set", "kv_cache_bytes=1000"], 5, "1,000 bytes"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(arguments, code, text, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "good"}\n{"prompt": 3}\n')
    out, err = run(capsys, STORY, *[str(bad) if item == "BAD" else item for item in arguments], code=code)
    assert text in err
    assert out == ""


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    whole = os.write

    def interrupted(descriptor: int, line: bytes) -> int:
        if b"second" not in line:
            return whole(descriptor, line[:5])
        whole(descriptor, line[:9])
        raise KeyboardInterrupt

    with line_writer(path) as lines:
        assert isinstance(lines, LineWriter)
        monkeypatch.setattr(os, "write", interrupted)
        lines.write({"text": "first, in pieces of five bytes: ü"})
        with pytest.raises(KeyboardInterrupt):
            lines.write({"text": "second"})
        assert lines.num_lines == 1
    assert read_lines(path) == [{"text": "first, in pieces of five bytes: ü"}]


def test_a_request_to_stop_keeps_what_is_done(tmp_path):
    rows = [{"prompt": "Once upon a time", "max_tokens": 1 + 10 * number} for number in range(60)]
    prompts, output = write_prompts(tmp_path, *rows), tmp_path / "texts.jsonl"
    arguments = ["generate", STORY, "--prompts", str(prompts), "-o", str(output), "--ignore-eos"]
    process = subprocess.Popen(
        [sys.executable, "-m", "optgptq_cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (output.exists() and output.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert out == ""
    assert "Traceback" not in err
    lines = read_lines(output)
    assert 0 < len(lines) < 60
    assert f"a request to stop after {len(lines)}" in err
    assert f"Their texts are in {output}, {len(lines)} lines." in err
    assert [line["finish_reason"] for line in lines] == ["length"] * len(lines)
