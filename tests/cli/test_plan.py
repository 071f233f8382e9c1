"""The command `plan`, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optgptq.planning.fit import Machine
from optgptq_cli.main import main

STORY = "bundled:story-llama"
SMALL = ["--set", "calibration.source=bundled:story-calibration", "--set", "calibration.num_windows=8"]
SMALL += ["--set", "calibration.window_size=256"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the machine can do is kept in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "optgptq" / "machine.json"


def test_it_ends_with_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert main(["plan", STORY, "-o", str(tmp_path / "out"), "--json", *SMALL]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fits"] is True
    assert result["bits_per_weight"] == 4.15625
    assert [phase["name"] for phase in result["phases"]] == [
        "source",
        "calibration text",
        "decoder layers",
        "writing",
        "verifying",
    ]
    assert result["seconds"] > result["phases"][2]["seconds"] > 0
    assert result["peak_memory_bytes"] > 200e6
    assert str(tmp_path) not in json.dumps(result)
    assert cache.is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_the_page_says_what_is_asked_for_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", STORY, "-r", "gptq-w4", "--target", "vllm", *SMALL]) == 0
    page = capsys.readouterr().out
    assert page.startswith("phase")
    assert "a decoder layer of 6" in page
    assert "4.1562" in page
    assert "lm_head: outside the decoder layers" in page
    assert "vLLM" in page
    assert page.endswith("fits\n")


def test_a_target_that_refuses_ends_with_4_behind_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", STORY, "-r", "binary-w3", "--target", "vllm", "--json", *SMALL]
    assert main([*arguments, "--set", "calibration.window_size=512"]) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["targets"][0]["loads"] is False
    assert json.loads(captured.err.splitlines()[-1])["error"]["kind"] == "TargetError"


def test_what_does_not_fit_ends_with_5_behind_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(free_memory_bytes=10**8, free_device_bytes=None, free_disk_bytes=10**10)
    monkeypatch.setattr("optgptq.planning.job_plan.machine_now", lambda device, folder, *, kept_bytes=0: machine)
    assert main(["plan", STORY, *SMALL]) == 5
    captured = capsys.readouterr()
    assert "does not fit: memory in phase " in captured.out
    assert "expected:" in captured.err


def test_a_recipe_that_does_not_fit_the_model_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", STORY, *SMALL, "--set", "weights.group_size=100"]) == 2
    assert capsys.readouterr().out == ""
