"""The runs of a job, however many it took: when each was, how it ended, and what its phases cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import torch

from optgptq.errors import CapacityError, OutputError
from optgptq.journal.store import SESSION_PREFIX, Journal
from optgptq.memory import peak_memory_bytes, resident_memory_bytes
from optgptq.native.library import native_name
from optgptq.reports import events
from optgptq.reports.events import ProgressListener
from optgptq.reports.run_record import processor_name

_WALK = "decoder layers"
# Phases of a run that has computed nothing yet.
_BEGINNING = ("source", "resuming")


@dataclass(slots=True)
class _Phase:
    name: str
    detail: str
    began: float


class SessionLog:
    """This run and those before it; a context manager around the run.

    Args:
        journal: keeps it beside the steps.
        listener: hears of every event after this log has.
    """

    def __init__(self, journal: Journal, listener: ProgressListener) -> None:
        self._journal = journal
        self._listener = listener
        self._began = time.perf_counter()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._first_layer: int | None = None
        self._phases: list[dict[str, Any]] = []
        self._phase: _Phase | None = None
        self._name: str | None = None

    def __enter__(self) -> SessionLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._name is not None:
            self._end_phase()
            # What the run ends with must not be hidden by a disk that is full.
            with suppress(CapacityError, OutputError):
                self._keep("failed" if issubclass(kind, Exception) else "interrupted")

    def hear(self, event: events.ProgressEvent) -> None:
        """Take an event in and pass it on."""
        match event:
            case events.PhaseStarted():
                self._begin(event.name, event.detail)
            case events.DecoderLayerStarted():
                self._first_layer = event.index if self._first_layer is None else self._first_layer
                self._begin(_WALK, "")
            case events.DecoderLayerFinished():
                if self._name is not None:
                    self._keep("interrupted")
            case _:
                pass
        self._listener(event)

    def open(self) -> None:
        """Begin to keep this run in the journal, which belongs to the job from here on."""
        self._name = f"{SESSION_PREFIX}{len(self._journal.names(SESSION_PREFIX)) + 1:05d}"
        self._keep("interrupted")

    def finish(self) -> None:
        """Note that this run has finished the job."""
        self._end_phase()
        self._keep("finished")

    def sessions(self) -> list[dict[str, Any]]:
        """Return all runs in order, this one included."""
        entries = (self._journal.get(name) for name in self._journal.names(SESSION_PREFIX))
        return [dict(entry.facts) for entry in entries if entry is not None]

    def _begin(self, name: str, detail: str) -> None:
        if self._phase is not None and self._phase.name == name:
            return
        self._end_phase()
        self._phase = _Phase(name, detail, time.perf_counter())

    def _end_phase(self) -> None:
        if self._phase is None:
            return
        self._phases.append(
            {
                "name": self._phase.name,
                "detail": self._phase.detail,
                "seconds": time.perf_counter() - self._phase.began,
                "resident_bytes": resident_memory_bytes(),
                "peak_bytes": peak_memory_bytes(),
            }
        )
        self._phase = None

    def _keep(self, ended: str) -> None:
        assert self._name is not None
        facts = {
            "started": self._started,
            "seconds": time.perf_counter() - self._began,
            "ended": ended,
            "first_layer": self._first_layer,
            "peak_memory_bytes": peak_memory_bytes(),
            "machine": {"native": native_name(), "threads": torch.get_num_threads(), "processor": processor_name()},
            "phases": self._phases,
        }
        self._journal.put(self._name, {}, facts)


def machine_warnings(sessions: list[dict[str, Any]]) -> list[str]:
    """Return a warning where runs that computed something did so in different ways."""
    machines = [_machine(session["machine"]) for session in sessions if _computed(session)]
    distinct = list(dict.fromkeys(machines))
    if len(distinct) < 2:
        return []
    return [
        f"the job was interrupted and went on with other means ({'; '.join(distinct)}): "
        "its bytes may differ from those of one run"
    ]


def _computed(session: Mapping[str, Any]) -> bool:
    return session["first_layer"] is not None or any(phase["name"] not in _BEGINNING for phase in session["phases"])


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine['native']}, {machine['threads']} threads, {machine['processor']}"
