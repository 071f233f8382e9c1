"""What the runs of a job tell of each other."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from optgptq.job_sessions import SessionLog, machine_warnings, repeated_kill_warnings
from optgptq.journal.store import Journal, open_journal
from optgptq.reports import events

CPU = torch.device("cpu")


def run(journal: Journal, *phases: tuple[str, str], layers: int = 0, told: list[str] | None = None) -> SessionLog:
    """Return the log of a run that has come so far and is killed there: nothing is told of its end."""

    def hear(event: events.ProgressEvent) -> None:
        if told is not None and isinstance(event, events.WarningRaised):
            told.append(event.message)

    log = SessionLog(journal, hear)
    log.open(CPU)
    for index in range(layers):
        log.hear(events.DecoderLayerStarted(index=index))
        finished = events.DecoderLayerFinished(index=index, seconds=1.0, output_error=None, peak_memory_bytes=1)
        log.hear(finished)
    for name, detail in phases:
        log.hear(events.PhaseStarted(name=name, detail=detail))
    return log


def interrupt(journal: Journal) -> None:
    """Leave the log of a run that was asked to stop."""
    with suppress(KeyboardInterrupt), SessionLog(journal, lambda event: None) as log:
        log.open(CPU)
        raise KeyboardInterrupt


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    with open_journal(tmp_path / ".out.work") as journal:
        journal.begin({"key": {}})
        yield journal


def test_a_run_that_never_told_its_end_was_killed(journal: Journal) -> None:
    run(journal, ("kv cache", "x"))
    interrupt(journal)
    last = run(journal)
    last.finish()
    assert [session["ended"] for session in last.sessions()] == ["killed", "interrupted", "finished"]


def test_runs_that_are_killed_twice_at_one_place_are_told(journal: Journal) -> None:
    told: list[str] = []
    run(journal, layers=2, told=told)
    run(journal, layers=3, told=told)
    assert told == []
    run(journal, layers=3, told=told)
    assert told == []
    run(journal, told=told)
    assert len(told) == 1
    assert "likely for want of memory" in told[0]
    assert "--activations disk" in told[0]


def test_a_run_in_between_that_was_stopped_is_no_sign(journal: Journal) -> None:
    run(journal, ("kv cache", ""))
    interrupt(journal)
    told: list[str] = []
    run(journal, ("kv cache", ""), told=told)
    run(journal, ("kv cache", ""), told=told)
    assert told == []


def killed(oom_kills: int | None) -> dict[str, Any]:
    return {"ended": "killed", "first_layer": None, "phase": None, "peak_memory_bytes": 2**30, "oom_kills": oom_kills}


@pytest.mark.parametrize(
    ("counts", "now", "reason"),
    [
        ((0, 1), 2, "the system has killed a process for want of memory each time"),
        ((0, 0), 1, "likely for want of memory"),
        ((None, None), None, "likely for want of memory"),
        ((3, 4), 0, "likely for want of memory"),
    ],
    ids=["both counted", "one of them", "untold", "a new group"],
)
def test_what_the_system_counted_is_evidence(counts: tuple[int | None, ...], now: int | None, reason: str) -> None:
    (told,) = repeated_kill_warnings([killed(count) for count in counts], oom_kills=now, planned_bytes=None)
    assert reason in told
    assert "1.0 GiB were taken" in told


def machine(**fields: Any) -> dict[str, Any]:
    return {"native": "avx2", "threads": 2, "processor": "p", "accelerator": None, **fields}


def session(phases: list[tuple[str, str]], **fields: Any) -> dict[str, Any]:
    named = [{"name": name, "detail": detail} for name, detail in phases]
    return {"first_layer": None, "phases": named[:-1], "phase": named[-1], "machine": machine(**fields)}


def test_another_accelerator_is_another_machine() -> None:
    runs = [session([("kv cache", "")], accelerator=name) for name in ("A", "B")]
    (told,) = machine_warnings(runs)
    assert "avx2, 2 threads, p, A; avx2, 2 threads, p, B" in told


@pytest.mark.parametrize(
    ("phases", "computes"),
    [
        ([("source", ""), ("kv cache", "")], True),
        ([("scales to fold", "")], True),
        ([("calibration text", "self")], True),
        ([("calibration text", "wikitext")], False),
        ([("source", ""), ("verifying", "")], False),
        ([("evaluation", ""), ("sample", "")], False),
    ],
)
def test_only_runs_that_compute_count(phases: list[tuple[str, str]], computes: bool) -> None:
    assert bool(machine_warnings([session(phases), session([("kv cache", "")], threads=3)])) is computes


def test_a_journal_of_an_older_release_names_no_processor() -> None:
    older = {"first_layer": 0, "phases": [], "machine": {"native": "avx2", "threads": 2}}
    (told,) = machine_warnings([older, session([("kv cache", "")])])
    assert "avx2, 2 threads; avx2, 2 threads, p" in told
