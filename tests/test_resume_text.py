"""A job that is stopped while its model writes the calibration text goes on with the texts that were finished."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faults.runner import environment
from support.quantizable import tiny_recipe, wide_llama, write_model
from support.stops import StoppedError, folder_bytes, run_with_stops, watched_puts

from optgptq.checkpoint.lock import work_folder
from optgptq.kept_work import kept_work
from optgptq.quantize import QuantizeResult, quantize
from optgptq.recipe.records import Recipe
from optgptq.runtime import self_text

TEXTS_PER_PART = 2
TEXT = {"num_windows": 7, "window_size": 16}
# A process that gets a signal while it writes its third part: two are kept.
STOPPED_COMMAND = f"""
import os, sys
from optgptq.runtime import self_text
from optgptq.runtime.engine import Engine
from optgptq_cli.main import main

self_text._RUNNING = {TEXTS_PER_PART}
number, parts, whole, step = int(sys.argv[1]), [], self_text.generate, Engine.step

def generate(engine, prompts, params):
    parts.append(len(params))
    return whole(engine, prompts, params)

def signalled(engine):
    if len(parts) == 3:
        os.kill(os.getpid(), number)
    return step(engine)

self_text.generate, Engine.step = generate, signalled
sys.exit(main(sys.argv[2:]))
"""


def recipe_of(**calibration: Any) -> Recipe:
    return tiny_recipe(bits=3, symmetric=False, calibration={**TEXT, **calibration})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return write_model(wide_llama(**sizes), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_text, "_RUNNING", TEXTS_PER_PART)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizeResult:
    """The job that was not stopped, with all texts at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_text, "_RUNNING", 128)
        return quantize(model, recipe_of(), tmp_path_factory.mktemp("reference") / "out")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the texts that were written, in order."""
    numbers: list[int] = []
    whole: Callable[..., Any] = self_text.generate
    seed = recipe_of().calibration.seed

    def hearing(engine: object, prompts: Sequence[Any], params: Sequence[Any]) -> Any:
        results = whole(engine, prompts, params)
        numbers.extend(each.seed - seed for each in params)
        return results

    monkeypatch.setattr(self_text, "generate", hearing)
    return numbers


def kept_parts(output: Path) -> list[str]:
    return sorted(path.stem for path in work_folder(output).glob("windows*"))


def test_stopped_after_every_part(model: Path, reference: QuantizeResult, tmp_path: Path, written: list[int]) -> None:
    result, steps = run_with_stops(model, recipe_of(), tmp_path / "out")
    parts = steps[: steps.index("windows")]
    assert len(parts) >= 4
    assert parts == [f"windows.part-{number:05d}" for number in range(len(parts))]
    assert written == list(range(len(written)))
    assert folder_bytes(result.output) == folder_bytes(reference.output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_a_signal_while_a_part_is_written(
    number: signal.Signals,
    exit_code: int,
    model: Path,
    reference: QuantizeResult,
    tmp_path: Path,
    written: list[int],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of().model_dump_json(exclude_unset=True), encoding="utf-8")
    output = tmp_path / "out"
    command = [str(int(number)), "quantize", str(model), "-r", str(recipe), "-o", str(output), "--quiet"]
    # Another number of threads would be told in the manifest.
    means = {**environment(), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run(
        [sys.executable, "-c", STOPPED_COMMAND, *command], env=means, capture_output=True, text=True, check=False
    )
    assert ended.returncode == exit_code, ended.stderr
    assert kept_parts(output) == ["windows.part-00000", "windows.part-00001"]
    told = "Calibration text that the model has written is kept. Run the same command again: it goes on there."
    assert kept_work(output) == told
    assert number == signal.SIGKILL or told in " ".join(ended.stderr.split())
    result = quantize(model, recipe_of(), output)
    # Texts 0 to 3 were kept.
    assert written == list(range(4, 4 + len(written)))
    assert len(written) >= 3
    assert folder_bytes(result.output) == folder_bytes(reference.output)


def test_parts_go_when_the_text_is_complete(model: Path, tmp_path: Path) -> None:
    def stop(name: str) -> None:
        if name == "layer-00000.qkv":
            raise StoppedError

    with pytest.raises(StoppedError), watched_puts(stop):
        quantize(model, recipe_of(), tmp_path / "out")
    assert kept_parts(tmp_path / "out") == ["windows"]


def test_parts_alone_are_no_reason_to_refuse_another_recipe(model: Path, tmp_path: Path) -> None:
    def stop(name: str) -> None:
        if name == "windows.part-00001":
            raise StoppedError

    whole = quantize(model, recipe_of(seed=5), tmp_path / "whole")
    with pytest.raises(StoppedError), watched_puts(stop):
        quantize(model, recipe_of(), tmp_path / "out")
    result = quantize(model, recipe_of(seed=5), tmp_path / "out")
    assert folder_bytes(result.output) == folder_bytes(whole.output)
