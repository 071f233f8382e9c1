"""`optgptq plan`: what a job will take and make, before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import DeviceOption, JsonOption, ModelArgument, QuietOption, RevisionOption
from .output import human_bytes, human_seconds, table, write_json, write_result
from .targets import TargetOption, TensorParallelOption, parse_targets, target_lines

if TYPE_CHECKING:
    from collections.abc import Iterable

    from optgptq.planning import JobPlan

# Dense linears that are named one by one.
_SHOWN_DENSE = 8


def plan(  # noqa: PLR0913 - the parameters of a command are its options
    model: ModelArgument,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Name of a shipped recipe (`optgptq recipes`), or a YAML file.")
    ] = "gptq-w4",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a recipe field: --set weights.bits=3. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder that the job will write, for its disk.", show_default=False),
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    target: TargetOption = None,
    tensor_parallel: TensorParallelOption = 1,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Forget what is known about the speed of this machine.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what a job will take and make: memory, disk, time, size, bits, who loads it; no weight or text is read."""
    from optgptq.checkpoint.hub import resolve_model
    from optgptq.planning import MachineFile, plan_job, require_fit
    from optgptq.recipe.loading import load_recipe
    from optgptq.targets import require_loads

    targets = parse_targets(target, tensor_parallel)
    loaded_recipe = load_recipe(recipe, overrides or ())
    found = plan_job(
        resolve_model(model, revision),
        loaded_recipe,
        device=device,
        output=output,
        kept=MachineFile(forget=measure_again),
        targets=targets,
        tensor_parallel=tensor_parallel,
    )
    if as_json:
        write_json(found.record())
    elif not quiet:
        write_result("\n\n".join(_page(found)))
    require_loads(found.targets)
    require_fit(found)


def _page(found: JobPlan) -> Iterable[str]:
    on_device = found.work.device.type != "cpu"
    header = ("phase", "time", "memory", *((f"on {found.work.device}",) if on_device else ()))
    yield table([row[: len(header)] for row in _phase_rows(found)], header=header)
    yield table(_result_rows(found))
    dense = [layout for layout in found.work.layouts if layout.bits is None]
    if dense and not found.work.keeps_weights:
        shown = [f"  {layout.name}: {layout.dense_reason}" for layout in dense[:_SHOWN_DENSE]]
        more = [f"  and {len(dense) - _SHOWN_DENSE} more"] if len(dense) > _SHOWN_DENSE else []
        yield "\n".join(["stays dense:", *shown, *more])
    told = [*found.checks, *found.warnings]
    if told:
        yield "\n".join(f"warning: {sentence}" for sentence in told)
    if found.targets:
        yield "\n".join(target_lines(found.targets))
    yield "\n".join(_verdict(found))


def _phase_rows(found: JobPlan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (
            phase.name,
            human_seconds(phase.seconds),
            human_bytes(phase.cpu_bytes),
            human_bytes(phase.device_bytes) if phase.device_bytes else "-",
        )
        for phase in found.phases
    ]
    if found.layer is not None:
        layers = found.work.spec.num_layers
        rows.append((f"a decoder layer of {layers}", human_seconds(found.layer.total), "", ""))
    rows.append(("in all", human_seconds(found.seconds), human_bytes(found.peak.cpu_bytes), ""))
    return rows


def _result_rows(found: JobPlan) -> list[tuple[str, str]]:
    disk, work = found.disk, found.work
    bits = f"{found.bits_per_weight:.4f}" if found.bits_per_weight else "as they were"
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in found.peak.parts.items() if size)
    return [
        ("output", f"{human_bytes(disk.output_bytes)} in {disk.num_weight_files} weight files"),
        ("  codes and scales", human_bytes(disk.quantized_bytes)),
        ("  dense tensors", human_bytes(disk.dense_bytes)),
        ("  other files", human_bytes(disk.other_bytes)),
        ("on disk at most", f"{human_bytes(disk.peak_bytes)}, with journal and activations"),
        ("bits per weight", f"{bits}; {found.file_bits_per_weight:.3f} over the whole file"),
        ("calibration", f"{work.num_windows} windows of {work.window_size} tokens, {work.num_held_out} held out"),
        ("activations", "on disk" if found.activations == "disk" else "in memory"),
        (f"peak, {found.peak.name}", parts),
    ]


def _verdict(found: JobPlan) -> list[str]:
    free = found.machine.free_memory_bytes
    memory = "unknown memory" if free is None else f"{human_bytes(free)} of memory"
    line = f"free: {memory}, {human_bytes(found.machine.free_disk_bytes)} of disk"
    if found.fits:
        return [line, "fits"]
    return [
        line,
        *(
            f"does not fit: {shortage.what} in phase {shortage.phase}: {human_bytes(shortage.needed_bytes)} needed, "
            f"{human_bytes(shortage.free_bytes)} free. {shortage.action}"
            for shortage in found.shortages
        ),
    ]
