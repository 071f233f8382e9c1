"""The runs of a job, however many it took: when each was, how it ended, and what its phases cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import torch

from optgptq.errors import CapacityError, OutputError
from optgptq.journal.store import SESSION_PREFIX, Journal
from optgptq.memory import memory_limit_bytes, oom_kills, peak_memory_bytes, resident_memory_bytes
from optgptq.native.library import native_name
from optgptq.reports import events
from optgptq.reports.events import ProgressListener
from optgptq.reports.run_record import processor_name

_WALK = "decoder layers"
# Phases that compute nothing that ends up in the output; a text that is read is one of them, one that is written not.
_COMPUTES_NOTHING = ("source", "resuming", "writing", "verifying", "evaluation", "sample")
_TEXT, _WRITTEN_TEXT, _TEXT_STEP = "calibration text", "self", "windows"
# How a run ends: `killed` is what a later run makes of one that never told.
_RUNNING, _KILLED, _INTERRUPTED, _FAILED, _FINISHED = "running", "killed", "interrupted", "failed", "finished"


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
        self._finished_layers = 0
        self._oom_kills = oom_kills()
        self._accelerator: str | None = None
        self._phases: list[dict[str, Any]] = []
        self._phase: _Phase | None = None
        self._detail = ""
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
                self._keep(_FAILED if issubclass(kind, Exception) else _INTERRUPTED)

    def hear(self, event: events.ProgressEvent) -> None:
        """Take an event in and pass it on."""
        match event:
            case events.PhaseStarted():
                self._begin(event.name, event.detail)
            case events.DecoderLayerStarted():
                self._first_layer = event.index if self._first_layer is None else self._first_layer
                self._begin(_WALK, "")
            case events.DecoderLayerFinished():
                self._finished_layers += 1
                if self._name is not None:
                    self._keep(_RUNNING)
            case _:
                pass
        self._listener(event)

    def open(self, device: torch.device, *, planned_bytes: int | None = None) -> None:
        """Begin to keep this run, which computes on `device`, in the journal, which belongs to the job from here on.

        Where the runs before died at one place without a word, a warning says so, with the memory that was planned,
        `planned_bytes`; it is no part of the output.
        """
        before = self.sessions()
        self._accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self._name = f"{SESSION_PREFIX}{len(self._journal.names(SESSION_PREFIX)) + 1:05d}"
        self._keep(_RUNNING)
        for warning in repeated_kill_warnings(before, oom_kills=self._oom_kills, planned_bytes=planned_bytes):
            self._listener(events.WarningRaised(message=warning))

    def as_finished(self) -> list[dict[str, Any]]:
        """Return all runs in order as they will be told once the output is there; only `finish` keeps that."""
        self._end_phase()
        return [*self.sessions()[:-1], self._facts(_FINISHED)]

    def finish(self) -> None:
        """Note that this run has finished the job: its output is there. What comes after is no part of the run."""
        self._end_phase()
        # The output is safe, and what is told of the job was kept before it.
        with suppress(CapacityError, OutputError):
            self._keep(_FINISHED)
        self._name = None

    def sessions(self) -> list[dict[str, Any]]:
        """Return all runs in order, this one included."""
        entries = {name: self._journal.get(name) for name in self._journal.names(SESSION_PREFIX)}
        sessions = {name: dict(entry.facts) for name, entry in entries.items() if entry is not None}
        for name, session in sessions.items():
            # Nobody else works on the output: what still runs there was killed.
            if session["ended"] == _RUNNING and name != self._name:
                session["ended"] = _KILLED
        return list(sessions.values())

    def _begin(self, name: str, detail: str) -> None:
        if name == _TEXT and _TEXT_STEP in self._journal.names(_TEXT_STEP):
            detail = "kept"
        if self._phase is not None and self._phase.name == name:
            if self._detail == detail:
                return
        else:
            self._end_phase()
            self._phase = _Phase(name, detail, time.perf_counter())
        self._detail = detail
        if self._name is not None:
            self._keep(_RUNNING)

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
        self._journal.put(self._name, {}, self._facts(ended))

    def _facts(self, ended: str) -> dict[str, Any]:
        return {
            "started": self._started,
            "seconds": time.perf_counter() - self._began,
            "ended": ended,
            "first_layer": self._first_layer,
            "finished_layers": self._finished_layers,
            "phase": None if self._phase is None else {"name": self._phase.name, "detail": self._detail},
            "peak_memory_bytes": peak_memory_bytes(),
            "oom_kills": self._oom_kills,
            "machine": {
                "native": native_name(),
                "threads": torch.get_num_threads(),
                "processor": processor_name(),
                "accelerator": self._accelerator,
            },
            "phases": self._phases,
        }


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


def repeated_kill_warnings(
    sessions: Sequence[Mapping[str, Any]], *, oom_kills: int | None, planned_bytes: int | None = None
) -> list[str]:
    """Return a warning where the last two runs were killed at one place: the next one will come to the same place.

    Args:
        sessions: the runs so far, in order.
        oom_kills: processes that the system has killed for want of memory, up to now; None where it does not tell.
        planned_bytes: most memory that the job was to take; None where nobody has planned it.
    """
    last = sessions[-2:]
    if len(last) < 2 or any(session["ended"] != _KILLED for session in last) or _place(last[0]) != _place(last[1]):
        return []
    known = [session.get("oom_kills") for session in last]
    counts = [count for count in known if count is not None]
    # The count is of the control group: another one begins at less.
    is_told = oom_kills is not None and len(counts) == 2 and counts[0] < counts[1] < oom_kills
    reason = "the system has killed a process for want of memory each time" if is_told else "likely for want of memory"
    taken = max(session["peak_memory_bytes"] for session in last)
    memory = [f"{_gib(taken)} were taken when they last told"]
    memory += [] if planned_bytes is None else [f"{_gib(planned_bytes)} were planned"]
    memory += [f"{_gib(memory_limit_bytes())} are there"]
    return [
        f"the last two runs of this job were killed at the same place ({_place_in_words(last[1])}), {reason}: "
        f"{', '.join(memory)}. This run will take as much. Give it more memory, or --activations disk, which changes "
        "no byte of the result; fewer or shorter calibration windows are another job, which begins anew with --restart"
    ]


def _place(session: Mapping[str, Any]) -> tuple[object, ...]:
    phase = session.get("phase") or {}
    return phase.get("name"), phase.get("detail"), _next_layer(session)


def _next_layer(session: Mapping[str, Any]) -> int:
    return (session["first_layer"] or 0) + int(session.get("finished_layers", 0))


def _place_in_words(session: Mapping[str, Any]) -> str:
    phase = session.get("phase") or {"name": "the beginning", "detail": ""}
    detail = f"decoder layer {_next_layer(session) + 1}" if phase["name"] == _WALK else phase["detail"]
    return f"{phase['name']}, {detail}" if detail else str(phase["name"])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _computed(session: Mapping[str, Any]) -> bool:
    phases = [*session["phases"], *([session["phase"]] if session.get("phase") else [])]
    return session["first_layer"] is not None or any(_computes(phase) for phase in phases)


def _computes(phase: Mapping[str, Any]) -> bool:
    if phase["name"] == _TEXT:
        return bool(phase["detail"] == _WRITTEN_TEXT)
    return phase["name"] not in _COMPUTES_NOTHING


def _machine(machine: Mapping[str, Any]) -> str:
    known = (machine.get("native"), f"{machine.get('threads')} threads", machine.get("processor"))
    return ", ".join(str(part) for part in (*known, machine.get("accelerator")) if part is not None)
