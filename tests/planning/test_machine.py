"""The file of measurements: a cache that helps where it can and is never in the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from optgptq.environment import cache_folder
from optgptq.errors import OutputError
from optgptq.planning.machine import MachineFile, disk_rate, machine_rates, seconds_of


class Counted:
    """A measurement that says how often it was made."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Mapping[str, float]:
        self.count += 1
        return {"bytes": 10.0 * self.count}


def test_a_measurement_is_made_once(tmp_path: Path) -> None:
    measure = Counted()
    assert MachineFile(tmp_path).get("disk", measure) == {"bytes": 10.0}
    assert MachineFile(tmp_path).get("disk", measure) == {"bytes": 10.0}
    assert measure.count == 1
    assert MachineFile(tmp_path, forget=True).get("disk", measure) == {"bytes": 20.0}
    assert MachineFile(tmp_path).get("disk", measure) == {"bytes": 20.0}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 2}',
        '{"version": 2, "machine": "another", "since": 1e12, "measured": {"disk": {"bytes": 1}}}',
    ],
)
def test_a_file_that_says_nothing_is_measured_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "machine.json").write_text(content, "utf-8")
    measure = Counted()
    assert MachineFile(tmp_path).get("disk", measure) == {"bytes": 10.0}


def test_a_measurement_gets_old(tmp_path: Path) -> None:
    measure, hour = Counted(), 3600.0
    for time, count in [(0, 1), (11 * hour, 1), (13 * hour, 2), (12.5 * hour, 3), (24 * hour, 3)]:
        assert MachineFile(tmp_path, clock=lambda time=time: time).get("disk", measure) == {"bytes": 10.0 * count}


@pytest.mark.parametrize("value", ['"fast"', "true", "-1", "NaN", "1e999", "null"])
def test_a_rate_that_is_no_number_is_measured_again(tmp_path: Path, value: str) -> None:
    MachineFile(tmp_path).get("disk", Counted())
    path = tmp_path / "machine.json"
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content).replace("10.0", value), "utf-8")
    measure = Counted()
    MachineFile(tmp_path).get("disk", measure)
    assert measure.count == 1


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    kept = MachineFile(tmp_path / "file")
    assert kept.get("disk", Counted()) == {"bytes": 10.0}


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "optgptq"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder({}) == tmp_path / ".cache" / "optgptq"
    assert cache_folder({"XDG_CACHE_HOME": "relative"}) == tmp_path / ".cache" / "optgptq"


def test_rates_of_this_machine_are_kept(tmp_path: Path) -> None:
    kept = MachineFile(tmp_path)
    found = machine_rates(kept, torch.float32, torch.device("cpu"))
    assert found.products > 1e8
    assert found.hashed_bytes > 1e6
    assert machine_rates(MachineFile(tmp_path), torch.float32, torch.device("cpu")) == found
    assert disk_rate(kept, tmp_path) > 0


def test_a_folder_that_is_not_there_has_no_rate(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        disk_rate(MachineFile(tmp_path), tmp_path / "missing")
    assert "missing" in caught.value.where


def test_time_is_that_of_the_action() -> None:
    assert seconds_of(lambda: sum(range(200_000)), torch.device("cpu")) > 0
