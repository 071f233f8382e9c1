"""Whether this machine has what a job takes, and what helps where it has not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from optgptq.calibration.disk_states import Activations
from optgptq.memory import available_memory_bytes, resident_memory_bytes
from optgptq.planning.disk import DiskNeed
from optgptq.planning.layer_memory import layer_memory
from optgptq.planning.memory import PhaseMemory
from optgptq.planning.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of a job: wall seconds, and the most memory that it holds, by part in `parts`."""

    name: str
    seconds: float
    cpu_bytes: int
    device_bytes: int
    parts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a job finds: free memory of the machine (what this process holds counted in) and of the device, and disk.

    None where it is not known.
    """

    free_memory_bytes: int | None
    free_device_bytes: int | None
    free_disk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """What does not fit: of which phase, how much is needed and free, and what helps, a sentence."""

    what: str
    phase: str
    needed_bytes: int
    free_bytes: int
    action: str


def machine_now(device: torch.device, folder: Path, *, kept_bytes: int = 0) -> Machine:
    """Return what is free now; `kept_bytes` of the disk are held by the job itself."""
    free = available_memory_bytes()
    return Machine(
        free_memory_bytes=None if free is None else free + (resident_memory_bytes() or 0),
        free_device_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        free_disk_bytes=shutil.disk_usage(folder).free + kept_bytes,
    )


def most(phases: dict[str, PhaseMemory]) -> tuple[int, int]:
    return max(phase.device_bytes for phase in phases.values()), max(phase.cpu_bytes for phase in phases.values())


def memory_fits(phases: dict[str, PhaseMemory], machine: Machine) -> bool:
    return all(
        _is_enough(machine.free_memory_bytes, phase.cpu_bytes)
        and _is_enough(machine.free_device_bytes, phase.device_bytes)
        for phase in phases.values()
    )


def _is_enough(free: int | None, needed: int) -> bool:
    return free is None or needed <= free


def shortages(
    work: Workload, phases: Sequence[Phase], disk: DiskNeed, machine: Machine, activations: Activations
) -> list[Shortage]:
    """Return the phases that need more than there is, the neediest of each kind."""
    found = []
    for what, free, needs in (
        ("memory", machine.free_memory_bytes, {phase.name: phase.cpu_bytes for phase in phases}),
        (f"memory of {work.device}", machine.free_device_bytes, {phase.name: phase.device_bytes for phase in phases}),
    ):
        name = max(needs, key=lambda phase: needs[phase])
        if free is not None and needs[name] > free:
            action = _what_helps(work, name, activations)
            found.append(Shortage(what=what, phase=name, needed_bytes=needs[name], free_bytes=free, action=action))
    # Without activations, which a full disk keeps nobody from computing again.
    needed = disk.peak_bytes - (disk.spilled_bytes if activations == "memory" else 0)
    if needed > machine.free_disk_bytes:
        action = "Free space, or choose an output folder on another disk."
        found.append(
            Shortage(
                what="disk", phase="writing", needed_bytes=needed, free_bytes=machine.free_disk_bytes, action=action
            )
        )
    return found


def _what_helps(work: Workload, phase: str, activations: Activations) -> str:
    """Return a sentence about the largest things that a user can make smaller."""
    if phase == "calibration text" and work.recipe.calibration.source == "self":
        return "Name a text with calibration.source: a model that writes its own is in memory as a whole."
    if phase != "decoder layers":
        return "Close other programs, or use a machine with more memory."
    stages = layer_memory(work, 0, activations=activations).values()
    streams, passes = max(stage.streams for stage in stages), max(stage.work for stage in stages)
    moments = max(stage.moments for stage in stages)
    if streams >= max(passes, moments):
        return f"Use fewer windows: calibration.num_windows={max(work.num_windows // 2, 1)}."
    smaller = "" if activations == "disk" else "keep activations on disk, "
    return (
        "The widest linear decides: close other programs, "
        f"{smaller}set calibration.windows_per_batch=1, keep it dense (weights.keep_dense), or use more memory."
    )
