"""The real command: stopped in the middle, and watched through a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "optgptq_cli", "quantize", "bundled:story-llama", "-r", "gptq-w4"]
SOURCE = ["--set", "calibration.source=bundled:story-calibration"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "TERM")}


def start(output: Path, *extra: str, num_windows: int) -> subprocess.Popen[str]:
    arguments = [*COMMAND, "-o", str(output), *SOURCE, "--set", f"calibration.num_windows={num_windows}", *extra]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def stop_after_first_layer(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send the signal once a decoder layer is done, and return all of stderr."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if line.startswith("decoder layer 1/"):
            process.send_signal(number)
            break
    out, rest = process.communicate(timeout=60)
    assert out == ""
    return seen + rest


KEPT = re.compile(
    r"interrupted: optgptq\n  expected: to finish\n  found:    a request to stop\n"
    r"  to do:    (\d) finished decoder layers? (?:is|are) kept\. "
    r"Run the same command again: it goes on at decoder layer (\d) of 6\.\n\Z"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_job_keeps_finished_layers_and_goes_on(tmp_path, number):
    process = start(tmp_path / "out", num_windows=64)
    stderr = stop_after_first_layer(process, number)
    assert process.returncode == 75
    told = KEPT.search(stderr)
    assert told is not None, stderr
    finished = int(told[1])
    assert 1 <= finished < 6
    assert int(told[2]) == finished + 1
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    _, stderr = start(tmp_path / "out", num_windows=64).communicate(timeout=120)
    resumed = "decoder layer 1 is finished" if finished == 1 else f"decoder layers 1 to {finished} are finished"
    assert f"resuming: {resumed}" in stderr
    assert f"\ndecoder layer {finished}/6," not in stderr
    assert f"\ndecoder layer {finished + 1}/6," in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.run.json"]


def test_a_job_stopped_before_anything_is_finished_leaves_nothing(tmp_path):
    process = start(tmp_path / "out", num_windows=64)
    assert process.stderr is not None
    for line in process.stderr:
        if "calibration text: " in line:
            process.send_signal(signal.SIGTERM)
            break
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    assert stderr.endswith("Nothing half-written was left. Run the same command again to start over.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_job_leaves_the_old_output_as_it_was(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text('{"old": true}')
    process = start(output, "--overwrite", num_windows=64)
    stop_after_first_layer(process, signal.SIGINT)
    assert process.returncode == 75
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.work", "out"]
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert (output / "config.json").read_text() == '{"old": true}'


def run_in_terminal(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run a command whose three streams are a terminal of 24 lines and return its exit code and what it drew."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        arguments, stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True, env=environment
    )
    os.close(terminal)
    drawn = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        ready, _, _ = select.select([controller], [], [], 1.0)
        if ready:
            try:
                chunk = os.read(controller, 65536)
            except OSError:  # the last process closed the terminal
                break
            if not chunk:
                break
            drawn += chunk
        elif process.poll() is not None:
            break
    os.close(controller)
    return process.wait(timeout=10), drawn.decode(errors="replace")


def test_a_terminal_shows_a_live_view_and_keeps_one_line_per_decoder_layer(tmp_path):
    arguments = [*COMMAND, "-o", str(tmp_path / "out"), *SOURCE, "--set", "calibration.num_windows=24"]
    environment = {**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"}
    code, drawn = run_in_terminal(arguments, environment)
    assert code == 0
    assert "\x1b[" in drawn
    # The live part: stage, linear with its loss, memory, time left.
    assert "elapsed" in drawn
    assert "memory" in drawn
    assert "left" in drawn
    assert "model.layers." in drawn
    for index in range(1, 7):
        assert f"decoder layer {index}/6" in drawn
    assert "bits per weight" in drawn


def test_a_build_machine_with_a_terminal_gets_plain_lines(tmp_path):
    arguments = [*COMMAND, "-o", str(tmp_path / "out"), *SOURCE, "--set", "calibration.num_windows=2"]
    code, drawn = run_in_terminal(arguments, {**ENVIRONMENT, "TERM": "xterm-256color", "CI": "true"})
    assert code == 0
    assert "elapsed" not in drawn
    assert "decoder layer 6/6" in drawn
