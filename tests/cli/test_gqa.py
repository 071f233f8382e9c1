"""The command `gqa` on the bundled model, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optgptq_cli.main import main

STORY = "bundled:story-llama"
SMALL = ["--set", "calibration.source=bundled:story-calibration", "--set", "calibration.num_windows=8"]
SMALL += ["--set", "calibration.window_size=64"]


def test_it_ends_with_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(["gqa", STORY, "-o", str(output), "--json", *SMALL]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["output"] == str(output)
    assert (result["num_kv_heads_before"], result["num_kv_heads_after"]) == (2, 1)
    assert (result["kv_bytes_per_token_before"], result["kv_bytes_per_token_after"]) == (1536, 768)
    assert result["perplexity_ratio"] == result["perplexity_after"] / result["perplexity_before"]
    assert result["measured_on"] == "held-out calibration windows"
    assert "grouping heads: decoder layer 6/6" in captured.err
    assert "2 to 1 key/value heads, 1,536 to 768 bytes per token" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_people_see_perplexity_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--group", "2", "--text", "bundled:story-evaluation", "--max-perplexity-ratio", "3"]
    assert main(["gqa", STORY, "-o", str(tmp_path / "out"), *arguments, *SMALL, "--quiet"]) == 0
    page, progress = capsys.readouterr()
    assert "decoder layer" not in progress
    assert "dense perplexity" in page
    assert "1,536 to 768" in page
    assert "text, " in page


def test_quantize_tells_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", STORY, "-r", "opt-gqa-w4", "-o", str(tmp_path / "out"), *SMALL]) == 0
    page = capsys.readouterr().out
    assert "key/value heads" in page
    assert "dense perplexity" in page
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--max-perplexity-ratio", "1.0"], 7, "gqa.max_perplexity_ratio"),
        (["--group", "3"], 2, "a divisor of the model's 2 key/value heads"),
        (["--group", "1"], 2, "gqa.group"),
        (["--group", "0"], 2, "gqa.group"),
        (["--text", "no-such.txt"], 3, "no-such.txt"),
        (["--set", "gqa.grouping=dynamic"], 2, "one of auto, similarity, cosine, adjacent"),
    ],
)
def test_what_goes_wrong_has_its_exit_code_and_leaves_nothing(
    arguments: list[str], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gqa", STORY, "-o", str(tmp_path / "out"), *SMALL, *arguments]) == code
    assert text in capsys.readouterr().err
    # What was computed before a gate was missed can be used under another limit.
    assert [path.name for path in tmp_path.iterdir()] == ([".out.work"] if code == 7 else [])
