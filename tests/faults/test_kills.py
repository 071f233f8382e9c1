"""Jobs that are killed or stopped at random times, again and again, and then go on to the bytes of one that was not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faults.cases import Case, require_end, write_recipe, write_tiny_model
from support.faults.model import read_tree
from support.faults.operations import Fault
from support.faults.runner import environment

METHODS = ["rtn", "gptq", "attention_aware", "gptqt", "binary"]


def killed_often(case: Case, num_kills: int, generator: random.Random) -> None:
    """Kill a job at random times, half of the time before it was finished again."""
    case.begin(case.before)
    seconds = case.run().seconds
    kills = 0
    while kills < num_kills:
        case.begin(case.before)
        while True:
            delay = generator.uniform(0, seconds)
            ended = case.runner.run_signalled(case.arguments, case.root, signal.SIGKILL, seconds=delay)
            where = f"killed after {delay:.3f} of {seconds:.3f} s"
            case.require_old_or_new(where)
            kills += ended.exit_code == -signal.SIGKILL
            if ended.exit_code == 0 or kills == num_kills or generator.random() < 0.5:
                break
        if ended.exit_code != 0:
            case.require_finished(where)


@pytest.mark.parametrize("name", METHODS)
def test_killed_at_random_times(name: str, case_of: Callable[[str], Case]) -> None:
    killed_often(case_of(name), 4, random.Random(name))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", METHODS)
def test_two_hundred_kills(name: str, case_of: Callable[[str], Case]) -> None:
    killed_often(case_of(name), 200, random.Random(f"nightly {name}"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_at_a_random_time(number: signal.Signals, case_of: Callable[[str], Case]) -> None:
    case = case_of("gptq")
    generator = random.Random(int(number))
    case.begin(case.before)
    seconds = case.run().seconds
    for _ in range(2):
        case.begin(case.before)
        # A process that has not come to its first line yet dies of the signal, as any process does.
        delay = generator.uniform(0.2, 0.9) * seconds
        ended = case.runner.run_signalled(case.arguments, case.root, number, seconds=delay)
        where = f"{number.name} after {delay:.3f} of {seconds:.3f} s"
        require_end(ended, Fault.TERMINATED, where)
        case.require_old_or_new(where)
        if ended.exit_code != 0:
            case.require_finished(where)


def test_the_installed_command_is_killed(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    recipe = write_recipe("gptq", tmp_path)
    command = [sys.executable, "-m", "optgptq_cli", "quantize", str(model), "-r", str(recipe), "-o"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, env=environment())
    output = tmp_path / "root" / "out"
    output.parent.mkdir()
    with subprocess.Popen(
        [*command, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    ) as process:
        while process.poll() is None and not list(output.parent.glob(".out.work/layer-00000.o.*")):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    subprocess.run([*command, str(output)], check=True, capture_output=True, env=environment())
    assert read_tree(output) == read_tree(tmp_path / "whole")
    assert not list(output.parent.glob(".*"))
