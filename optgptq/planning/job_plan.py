"""The plan of a job: what every phase takes, what will come out, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optgptq.calibration.disk_states import Activations
from optgptq.kept_work import kept_bytes
from optgptq.memory import resident_memory_bytes
from optgptq.planning.checks import calibration_checks, job_warnings, target_subject
from optgptq.planning.disk import DiskNeed, bits_per_weight, disk_need
from optgptq.planning.fit import Machine, Phase, Shortage, machine_now, memory_fits, most, shortages
from optgptq.planning.machine import MachineFile, disk_rate, machine_rates
from optgptq.planning.memory import PhaseMemory, memory_phases
from optgptq.planning.seconds import LayerSeconds, TimeModel
from optgptq.planning.workload import Workload, read_workload
from optgptq.recipe.records import Recipe
from optgptq.targets import Target, TargetAnswer, check_target

# Resident memory of a process with everything loaded, where the system does not tell.
_USUAL_BASE_BYTES = 260 * 2**20
# Loading modules before a job begins.
_START_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JobPlan:
    """What a job will take and make.

    Attributes:
        work: the job.
        phases: in the order in which they run.
        layer: what the first decoder layer takes; None where no weight is quantized.
        disk: bytes of files.
        bits_per_weight: effective, over the quantized linears.
        activations: where the streams are kept.
        checks, warnings: what to know about calibration and result, in plain sentences.
        targets: answers of the engines that were asked for.
        machine: what is free.
        shortages: what does not fit; empty where all does.
    """

    work: Workload
    phases: tuple[Phase, ...]
    layer: LayerSeconds | None
    disk: DiskNeed
    bits_per_weight: float
    activations: Activations
    checks: tuple[str, ...]
    warnings: tuple[str, ...]
    targets: tuple[TargetAnswer, ...]
    machine: Machine
    shortages: tuple[Shortage, ...]

    @property
    def fits(self) -> bool:
        """Memory and disk are enough."""
        return not self.shortages

    @property
    def seconds(self) -> float:
        """Wall time of the whole job."""
        return _START_SECONDS + sum(phase.seconds for phase in self.phases)

    @property
    def peak(self) -> Phase:
        """The phase that takes most memory of the processor."""
        return max(self.phases, key=lambda phase: phase.cpu_bytes)

    @property
    def file_bits_per_weight(self) -> float:
        """All bytes of the weight files over all weights of the model."""
        weights = sum(_numbers(info.shape) for info in self.work.source.tensors.tensors.values())
        return 8 * (self.disk.quantized_bytes + self.disk.dense_bytes) / max(weights, 1)

    def record(self) -> dict[str, Any]:
        """Return the plan as plain values, without paths."""
        return {
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak.cpu_bytes,
            "peak_phase": self.peak.name,
            "peak_device_bytes": max(phase.device_bytes for phase in self.phases),
            "peak_disk_bytes": self.disk.peak_bytes,
            "output_bytes": self.disk.output_bytes,
            "bits_per_weight": self.bits_per_weight,
            "file_bits_per_weight": self.file_bits_per_weight,
            "activations": self.activations,
            "phases": [asdict(phase) for phase in self.phases],
            "decoder_layer": None if self.layer is None else {**asdict(self.layer), "seconds": self.layer.total},
            "num_decoder_layers": self.work.spec.num_layers,
            "disk": asdict(self.disk),
            "dense": [
                {"name": layout.name, "reason": layout.dense_reason}
                for layout in self.work.layouts
                if layout.bits is None
            ],
            "calibration": {
                "num_windows": self.work.num_windows,
                "window_size": self.work.window_size,
                "num_held_out": self.work.num_held_out,
                "checks": list(self.checks),
            },
            "warnings": list(self.warnings),
            "targets": [answer.record() for answer in self.targets],
            "machine": asdict(self.machine),
            "fits": self.fits,
            "shortages": [asdict(shortage) for shortage in self.shortages],
        }


def plan_job(
    model: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    output: Path | None = None,
    activations: Activations | None = None,
    kept: MachineFile | None = None,
    targets: Sequence[Target] = (),
    tensor_parallel: int = 1,
) -> JobPlan:
    """Return the plan of a job from config and headers alone.

    Args:
        model: folder of the model.
        recipe: what is asked of it.
        device: where it will run.
        output: the folder that will appear; None for one in the folder of the process.
        activations: where streams are kept; None: in memory where they fit, else on disk.
        kept: measurements of this machine; None for the file in the user's cache folder.
        targets: engines that shall load the result, on `tensor_parallel` devices.

    Raises:
        OptGPTQError: what the job would refuse before it reads a text or a weight, or a folder that cannot be written.
    """
    # Before anything is measured, which leaves memory behind.
    base = resident_memory_bytes() or _USUAL_BASE_BYTES
    folder = Path.cwd() if output is None else output.absolute().parent
    held = 0 if output is None else kept_bytes(output)
    work = read_workload(model, recipe, device=device)
    machine = machine_now(work.device, folder, kept_bytes=held)
    chosen: Activations = activations or "memory"
    phases = memory_phases(work, base, chosen)
    if activations is None and not memory_fits(phases, machine):
        on_disk = memory_phases(work, base, "disk")
        if most(on_disk) < most(phases):
            chosen, phases = "disk", on_disk
    disk = disk_need(work, spilled_bytes=_spilled(work, chosen))
    kept = kept or MachineFile()
    times = TimeModel(
        work,
        machine_rates(kept, work.dtype, work.device),
        kept,
        disk=disk,
        disk_bytes_per_second=disk_rate(kept, folder),
    )
    timed = tuple(_timed(name, memory, times) for name, memory in phases.items())
    return JobPlan(
        work=work,
        phases=timed,
        layer=None if work.keeps_weights else times.layer(0),
        disk=disk,
        bits_per_weight=bits_per_weight(work),
        activations=chosen,
        checks=calibration_checks(work),
        warnings=job_warnings(work),
        targets=tuple(check_target(target, target_subject(work), tensor_parallel) for target in targets),
        machine=machine,
        shortages=tuple(shortages(work, timed, disk, machine, chosen)),
    )


def _timed(name: str, memory: PhaseMemory, times: TimeModel) -> Phase:
    seconds = {
        "source": times.hashing,
        "calibration text": times.text,
        "grouping heads": times.heads,
        "scales to fold": times.heads,
        "decoder layers": times.solving,
        "output head": times.head,
        "writing": times.assembly,
        "verifying": times.verifying,
        "kv cache": times.cache,
    }[name]()
    return Phase(
        name=name,
        seconds=seconds,
        cpu_bytes=memory.cpu_bytes,
        device_bytes=memory.device_bytes,
        parts=dict(memory.parts),
    )


def _spilled(work: Workload, activations: Activations) -> int:
    """Return the activations that may lie on disk: those kept for a job that goes on, and those that are worked on."""
    spec, itemsize = work.spec, work.dtype.itemsize
    tokens = 0 if work.keeps_weights else work.num_tokens + work.reference_tokens
    kept = 2 * tokens * spec.hidden_size * itemsize
    if activations == "memory":
        return kept
    if work.source.grouping is not None:
        tokens = 2 * work.num_tokens
    elif work.cache_plan is not None and work.recipe.kv_cache.calibrated:
        tokens = max(tokens, 2 * min(work.recipe.kv_cache.num_windows, work.num_windows) * work.window_size)
    heads = max(spec.num_heads * spec.head_dim, spec.hidden_size)
    return kept + tokens * (spec.hidden_size + heads) * itemsize


def _numbers(shape: Sequence[int]) -> int:
    number = 1
    for size in shape:
        number *= size
    return number
