"""A job with a KV cache as its user sees it: the summary, `--json`, and the commands on what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optgptq.reports import events
from optgptq_cli.main import main
from optgptq_cli.progress import JobProgress
from optgptq_cli.quantize import _cache_rows

STORY = "bundled:story-llama"
SMALL = ["--set", "calibration.source=bundled:story-calibration", "--set", "calibration.num_windows=4"]
SMALL += ["--set", "calibration.window_size=64"]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with weights and cache of 4 bits, made by the command."""
    folder = tmp_path_factory.mktemp("made") / "w4-kv4"
    arguments = ["quantize", STORY, "-r", "w4-kv4", "-o", str(folder), "--quiet", "--set", "weights.group_size=64"]
    assert main([*arguments, *SMALL]) == 0
    return folder


def test_json_says_what_the_cache_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    arguments = ["quantize", STORY, "-r", "kv2", "-o", str(output), "--set", "kv_cache.calibrated=false"]
    result = run_json(capsys, *arguments)
    record = result["kv_cache"]
    # 6 layers of 2 heads: codes and one float16 pair for keys and for values of 32 channels.
    assert record["bytes_per_token"] == 6 * 2 * 2 * (8 + 4)
    assert record["exact_bytes_per_token"] == 6 * 2 * 2 * 32 * 2
    assert (record["bits_per_key"], record["bits_per_value"]) == (3.0, 3.0)
    assert (record["past_only"], record["sink_tokens"], record["recent_tokens"]) == ("chunk", 64, 128)
    assert record["calibration"] == {"calibrated": False}
    assert result["bits_per_weight"] == 0


def test_the_summary_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", STORY, "-r", "kv4", "-o", str(tmp_path / "out"), "--set", "kv_cache.skip_layers=0-3"]
    assert main([*arguments, *SMALL]) == 0
    captured = capsys.readouterr()
    lines = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in captured.out.splitlines()}
    assert lines["bits per weight"] == "as they were"
    assert lines["KV cache, bits per key and value"] == "12.333, 12.333"
    assert lines["KV cache, bytes per token"] == "1,184, 1,536 in 16 bits"
    assert lines["exact keys"] == "chunk, first 4, last 16"
    assert "rounded to the nearest" in lines["KL on held-out windows"]
    assert "6 decoder layers, kv4, dense\n" in captured.err
    assert "kv cache: decoder layer 6/6" in captured.err
    assert (
        "KV cache of 12.333 bits per key and 12.333 per value, 1,184 bytes per token in place of 1,536" in captured.err
    )


def test_what_was_written_is_inspected_verified_run_and_scored(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspected = run_json(capsys, "inspect", str(both))
    assert (inspected["format"], inspected["kv_cache"]["past_only"]) == ("gptq", "chunk")
    assert main(["verify", str(both)]) == 0
    capsys.readouterr()
    texts = {}
    for cache in ("checkpoint", "16"):
        arguments = ["generate", str(both), "Once upon a time", "--max-tokens", "8", "--kv-cache", cache]
        assert main([*arguments, "--set", "kv_cache_bytes=4000000"]) == 0
        texts[cache] = capsys.readouterr().out
    assert all(len(text) > 10 for text in texts.values())
    scored = ["eval", str(both), "--text", "bundled:story-evaluation", "--window-size", "128", "--max-tokens", "1024"]
    plain = run_json(capsys, *scored)
    decoded = run_json(capsys, *scored, "--decode")
    assert decoded["decode"] is True
    assert decoded["perplexity"] == pytest.approx(plain["perplexity"], rel=0.05)
    assert decoded["perplexity"] != plain["perplexity"]


def test_the_event_of_a_cache_is_a_line() -> None:
    event = events.CacheFound(key_bits=4.25, value_bits=2.25, bytes_per_token=1040.0, exact_bytes_per_token=4096.0)
    (line,) = JobProgress(clock=lambda: 0.0).update(event)
    assert line == (
        "[0.0 s] KV cache of 4.250 bits per key and 2.250 per value, 1,040 bytes per token in place of 4,096"
    )


@pytest.mark.parametrize(
    ("is_plain", "figures"),
    [(True, "0.50000 rounded to the nearest"), (False, "0.25000, 0.50000 rounded to the nearest")],
)
def test_the_figure_is_that_of_what_was_written(is_plain: bool, figures: str) -> None:
    cache = {"bits_per_key": 4.0, "bits_per_value": 4.0, "bytes_per_token": 1.0, "exact_bytes_per_token": 4.0}
    cache |= {"past_only": "chunk", "sink_tokens": 4, "recent_tokens": 16}
    kl = 0.5 if is_plain else 0.25
    found = {"held_out_kl": kl, "held_out_kl_plain": 0.5, "is_plain": is_plain}
    assert dict(_cache_rows({**cache, "calibration": found}))["KL on held-out windows"] == figures
