"""Sections about what the job took: time, memory, sessions, and the plan against what happened."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from optgptq.reports.blocks import Block, Facts, Note, Section, Table, shown_rows
from optgptq.reports.cost_charts import layer_costs, phase_bars
from optgptq.reports.run_data import RunData
from optgptq.reports.wording import (
    clean,
    count,
    digits,
    duration,
    entries,
    flat,
    num_bytes,
    number,
    plain_value,
    table_of,
    whole,
)

_LAYER_TIMING = re.compile(r"decoder layer (\d{1,6})")


def cost_section(data: RunData) -> Section:
    """Return time and memory over the run; a note where nobody kept them."""
    record = data.record
    sessions = entries(record, "sessions")
    starts = [start for session in sessions[1:] if (start := whole(session.get("first_layer"))) is not None]
    phases = entries(record, "phases")
    found = (
        layer_costs(_costs(record), starts),
        phase_bars(_phase_seconds(phases)),
        _sessions_table(sessions),
        _phases_table(phases),
        _batches_note(record),
    )
    blocks: list[Block] = [block for block in found if block is not None]
    if "seconds" in record:
        facts = [("time", duration(record.get("seconds"))), ("peak memory", num_bytes(record.get("peak_memory_bytes")))]
        blocks.insert(0, Facts(rows=facts))
    if not blocks:
        blocks.append(Note(text="Not known: timings stay out of a checkpoint, and there is no run record."))
    return Section(identifier="costs", title="Time and memory", blocks=blocks)


def _costs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return costs by decoder layer; from the timings where an older record has nothing else."""
    costs = entries(record, "decoder_layer_costs")
    if costs:
        return costs
    timings = table_of(record, "timings")
    named = ((_LAYER_TIMING.fullmatch(name), seconds) for name, seconds in timings.items())
    return [{"index": int(found[1]), "seconds": seconds} for found, seconds in named if found is not None]


def _phase_seconds(phases: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Return the seconds of each phase; steps of the same name are one."""
    sums: dict[str, float] = {}
    for phase in phases:
        name = clean(phase.get("name"), limit=100)
        sums[name] = sums.get(name, 0.0) + (number(phase.get("seconds")) or 0.0)
    return list(sums.items())


def _sessions_table(sessions: Sequence[Mapping[str, Any]]) -> Table | None:
    if not sessions:
        return None
    rows = [
        (
            clean(session.get("started"), limit=40),
            duration(session.get("seconds")),
            clean(session.get("ended"), limit=40),
            count(session.get("first_layer")),
        )
        for session in sessions
    ]
    ends = [session.get("ended") for session in sessions]
    breaks = sum(end != "finished" for end in ends)
    caption = f"Sessions: {len(sessions)}, {breaks} of them interrupted or failed"
    shown, left_out = shown_rows(rows, limit=200)
    return Table(caption=caption, header=("started", "time", "ended", "first layer"), rows=shown, left_out=left_out)


def _phases_table(phases: Sequence[Mapping[str, Any]]) -> Table | None:
    if not phases:
        return None
    rows = [
        (
            clean(phase.get("name"), limit=100),
            clean(phase.get("detail") or "-", limit=200),
            duration(phase.get("seconds")),
            num_bytes(phase.get("resident_bytes")),
            num_bytes(phase.get("peak_bytes")),
        )
        for phase in phases
    ]
    header = ("phase", "detail", "time", "memory at its end", "highest so far")
    shown, left_out = shown_rows(rows, limit=300)
    return Table(caption="Phases", header=header, rows=shown, folded=True, left_out=left_out)


def _batches_note(record: Mapping[str, Any]) -> Note | None:
    """Tell where memory ran out and batches were made smaller."""
    costs = entries(record, "decoder_layer_costs")
    sizes = [(whole(cost.get("index")), whole(cost.get("windows_per_batch"))) for cost in costs]
    told = [(index, size) for index, size in sizes if index is not None and size is not None]
    changes = [f"{size} from layer {index}" for (_, before), (index, size) in pairwise(told) if size < before]
    if not changes:
        return None
    first = f"Windows per batch began at {told[0][1]} and shrank when memory ran out: {', '.join(changes)}."
    return Note(text=first, tone="warning")


def plan_section(data: RunData) -> Section | None:
    """Return the plan beside what then happened; None where the record has no plan."""
    plan = table_of(data.record, "plan")
    if not plan:
        return None
    blocks: list[Block] = []
    rows = [row for row in _against(data, plan) if row is not None]
    if rows:
        header = ("figure", "planned", "happened", "planned / happened")
        blocks.append(Table(caption="Plan and outcome", header=header, rows=rows))
    by_phase = _plan_phases(data, plan)
    if by_phase is not None:
        blocks.append(by_phase)
    everything, left_out = shown_rows(
        [(name, plain_value(value)) for name, value in flat({**plan, "phases": None})], limit=300
    )
    caption = "The whole plan"
    blocks.append(Table(caption=caption, header=("field", "value"), rows=everything, folded=True, left_out=left_out))
    return Section(identifier="plan", title="Plan against what happened", blocks=blocks)


def _plan_phases(data: RunData, plan: Mapping[str, Any]) -> Table | None:
    """Return what was planned for each phase, with the time it then took where a phase of that name was measured."""
    planned = entries(plan, "phases")
    if not planned:
        return None
    took = dict(_phase_seconds(entries(data.record, "phases")))
    rows = [
        (
            (name := clean(phase.get("name"), limit=100)),
            duration(phase.get("seconds")),
            duration(took.get(name)),
            num_bytes(phase.get("cpu_bytes")),
            num_bytes(phase.get("device_bytes") or None),
        )
        for phase in planned
    ]
    header = ("phase", "time planned", "time taken", "memory planned", "on the device")
    shown, left_out = shown_rows(rows, limit=100)
    return Table(caption="Plan by phase", header=header, rows=shown, left_out=left_out)


def _against(data: RunData, plan: Mapping[str, Any]) -> list[tuple[str, ...] | None]:
    files = table_of(data.manifest, "files")
    written = sum(number(entry.get("bytes")) or 0.0 for entry in files.values() if isinstance(entry, dict))
    record = data.record
    return [
        _compared("time, without start-up", _planned_seconds(plan), record.get("seconds"), duration),
        _compared("peak memory", plan.get("peak_memory_bytes"), record.get("peak_memory_bytes"), num_bytes),
        _compared("size of the output", plan.get("output_bytes"), written or None, num_bytes),
        _compared("bits per weight", plan.get("bits_per_weight"), record.get("bits_per_weight"), digits),
    ]


def _planned_seconds(plan: Mapping[str, Any]) -> float | None:
    """Return the time of all phases; a plan's own total counts the start of the program too, a record's does not."""
    seconds = [number(phase.get("seconds")) for phase in entries(plan, "phases")]
    known = [value for value in seconds if value is not None]
    return sum(known) if known else number(plan.get("seconds"))


def _compared(name: str, planned: object, happened: object, show: Callable[[object], str]) -> tuple[str, ...] | None:
    prediction, outcome = number(planned), number(happened)
    if prediction is None or not outcome:
        return None
    return (name, show(prediction), show(outcome), digits(prediction / outcome, precision=3))
