"""`optgptq eval --decode`: figures of a quantized KV cache, and what goes with what."""

from __future__ import annotations

import json

import pytest

from optgptq_cli.main import main

STORY = "bundled:story-llama"
TEXT = ["--text", "bundled:story-evaluation", "--window-size", "128", "--max-tokens", "1024"]


def test_the_record_tells_the_cache(capsys) -> None:
    assert main(["eval", STORY, *TEXT, "--decode", "--kv-cache", "4", "--baseline-cache", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["decode"] is True
    assert 1e-4 < record["mean_kl"] < 0.05
    assert record["baseline_perplexity"] < 6
    cache = record["kv_cache"]
    assert (cache["bits"], cache["mode"], cache["bytes_per_token"]) == (5.0, "token", 480.0)
    assert main(["eval", STORY, *TEXT, "--json"]) == 0
    assert {"decode", "kv_cache"}.isdisjoint(json.loads(capsys.readouterr().out))


def test_the_page_tells_the_cache(capsys) -> None:
    assert main(["eval", STORY, *TEXT, "--decode", "--kv-cache", "8", "--past-only", "off"]) == 0
    captured = capsys.readouterr()
    assert "9.00 bits, 864 bytes per token" in captured.out
    assert "quantized KV cache: 9.00 bits per number of keys" in captured.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--kv-cache", "4"], "--kv-cache"),
        (["--past-only", "off"], "--past-only"),
        (["--baseline-cache"], "--baseline-cache"),
        (["--decode", "--baseline-cache", "--baseline", STORY], "--baseline-cache"),
        (["--decode", "--kv-cache", "5"], "one of checkpoint, 16"),
        (["--decode", "--kv-cache", "4", "--past-only", "window"], "window:N"),
        (["--decode", "--max-kl", "0.1"], "--baseline"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], text: str, capsys) -> None:
    assert main(["eval", STORY, *TEXT, *arguments]) == 2
    assert text in capsys.readouterr().err


def test_a_gate_on_the_cache_alone(capsys) -> None:
    arguments = ["eval", STORY, *TEXT, "--decode", "--kv-cache", "4", "--baseline-cache"]
    assert main([*arguments, "--max-kl", "0.05"]) == 0
    assert main([*arguments, "--max-kl", "1e-5"]) == 7
    assert "--max-kl" in capsys.readouterr().err
