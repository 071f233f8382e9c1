"""`optgptq quantize`: the main job."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .display import job_display
from .gates import gate_rows, require_gates, told_in_report, write_gate_report
from .gqa import heads_rows
from .interrupts import tells_what_is_kept
from .options import DeviceOption, JsonOption, ModelArgument, OverwriteOption, QuietOption, RevisionOption
from .output import human_bytes, human_seconds, table, write_json, write_result
from .targets import TargetOption, TensorParallelOption, parse_targets

if TYPE_CHECKING:
    from typing import Any

    from optgptq.calibration.disk_states import Activations
    from optgptq.gate_job import GateReport
    from optgptq.planning import JobPlan
    from optgptq.quantize import QuantizeResult
    from optgptq.reports.events import ProgressListener


class ActivationPlace(StrEnum):
    """Where activations of the calibration text are kept."""

    AUTO = "auto"
    MEMORY = "memory"
    DISK = "disk"


_KNOWN_PLACES: Mapping[ActivationPlace, Activations] = {
    ActivationPlace.MEMORY: "memory",
    ActivationPlace.DISK: "disk",
}


def quantize(  # noqa: PLR0913 - the parameters of a command are its options
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Name of a shipped recipe (`optgptq recipes`), or a YAML file.")
    ] = "gptq-w4",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a recipe field: --set weights.bits=3. Repeatable."),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", metavar="NAME=VALUE", help="Quality gate: --gate max_kl=0.05. Repeatable."),
    ] = None,
    target: TargetOption = None,
    tensor_parallel: TensorParallelOption = 1,
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    activations: Annotated[
        ActivationPlace,
        typer.Option("--activations", help="Where activations are kept; auto: on disk where memory does not do."),
    ] = ActivationPlace.AUTO,
    force: Annotated[
        bool, typer.Option("--force", help="Begin even where the plan says that memory or disk will not do.")
    ] = False,
    overwrite: OverwriteOption = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what an interrupted job has kept for this output, and begin anew.")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record", help="Write the run record, timings included, here; default: OUT.run.json.", show_default=False
        ),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="Write what came of the gates as JUnit XML.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize a model by a recipe and write a checkpoint that is checked before it appears.

    Interrupted, it keeps the decoder layers that are finished beside the output; the same command goes on from there.
    """
    from optgptq.environment import loading_modules

    with loading_modules():
        from optgptq.checkpoint.hub import resolve_model
        from optgptq.checkpoint.publish import require_place
        from optgptq.job_options import JobOptions
        from optgptq.memory import keep_freed_memory
        from optgptq.planning import plan_job, require_fit
        from optgptq.quantize import quantize as quantize_model
        from optgptq.recipe.loading import load_recipe
        from optgptq.reports.run_record import record_path

    _require_places(record, junit)
    keep_freed_memory()
    loaded_recipe = load_recipe(recipe, (*(overrides or ()), *(f"gates.{limit}" for limit in gate or ())))
    targets = parse_targets(target, tensor_parallel)
    folder = resolve_model(model, revision)
    require_place(output, source=folder)
    with told_in_report(junit), tells_what_is_kept(output), job_display(quiet=quiet) as listener:
        plan = plan_job(
            folder,
            loaded_recipe,
            device=device,
            output=output,
            activations=_KNOWN_PLACES.get(activations),
            targets=targets,
            tensor_parallel=tensor_parallel,
        )
        _tell(plan, listener)
        if not force:
            require_fit(plan)
        options = JobOptions(
            restart=restart,
            activations=plan.activations,
            record=record or record_path(output),
            plan=plan.record(),
        )
        result = quantize_model(
            folder, loaded_recipe, output, overwrite=overwrite, progress=listener, device=device, options=options
        )
    gates = result.gates
    figures = gates.evaluation or {}
    problem = write_gate_report(junit, gates.outcomes, figures, seconds=result.seconds, failure=gates.failure)
    if as_json:
        write_json(_json(result))
    elif not quiet:
        write_result(_summary(result))
    if gates.failure is not None:
        gates.require_passed()
    require_gates(gates.outcomes, problem=problem)


def _require_places(record: Path | None, junit: Path | None) -> None:
    """Raise OutputError where a file that is asked for cannot be written; an older JUnit report goes."""
    from .record import require_writable

    for path, option in ((record, "--record"), (junit, "--junit")):
        if path is not None:
            require_writable(path, option=option)
    if junit is not None:
        # What an earlier run found must not stand beside the failure of this one.
        junit.unlink(missing_ok=True)


def _tell(plan: JobPlan, listener: ProgressListener) -> None:
    """Tell the essence of a plan; TargetError where a target cannot load the result."""
    from optgptq.planning import essence
    from optgptq.reports import events
    from optgptq.targets import require_loads

    for line in essence(plan):
        listener(events.PhaseStarted(name="plan", detail=line))
    require_loads(plan.targets)
    for answer in plan.targets:
        for line in answer.lines():
            listener(events.PhaseStarted(name="target", detail=line))


def _json(result: QuantizeResult) -> dict[str, Any]:
    from optgptq.gate_job import GateReport

    return {
        "output": str(result.output),
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "bits_per_weight": result.bits_per_weight,
        **({"kv_cache": result.record["kv_cache"]} if "kv_cache" in result.record else {}),
        **(result.gates.record() if result.gates != GateReport() else {}),
        "warnings": list(result.warnings),
    }


def _summary(result: QuantizeResult) -> str:
    rows = [
        ("output", str(result.output)),
        ("bits per weight", f"{result.bits_per_weight:.4f}" if result.bits_per_weight else "as they were"),
        *(heads_rows(result.record["gqa"]) if "gqa" in result.record else ()),
        *(_cache_rows(result.record["kv_cache"]) if "kv_cache" in result.record else ()),
        ("time", human_seconds(result.seconds)),
        ("peak memory", human_bytes(result.peak_memory_bytes)),
        *_quality_rows(result.gates),
        ("warnings", str(len(result.warnings))),
    ]
    return table(rows)


def _quality_rows(gates: GateReport) -> list[tuple[str, str]]:
    rows = []
    if gates.evaluation is not None:
        rows.append(("perplexity", f"{gates.evaluation['perplexity']:.4f}"))
        if gates.evaluation.get("mean_kl") is not None:
            rows.append(("mean KL, nats per token", f"{gates.evaluation['mean_kl']:.6f}"))
    rows += gate_rows(gates.outcomes)
    if gates.sample is not None:
        rows.append(("sample", " ".join(gates.sample.text.split())))
    return rows


def _cache_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = record["calibration"]
    rows = [
        ("KV cache, bits per key and value", f"{record['bits_per_key']:.3f}, {record['bits_per_value']:.3f}"),
        (
            "KV cache, bytes per token",
            f"{record['bytes_per_token']:,.0f}, {record['exact_bytes_per_token']:,.0f} in 16 bits",
        ),
        (
            "exact keys",
            f"{record['past_only']}, first {record['sink_tokens']}, last {record['recent_tokens']}",
        ),
    ]
    if "held_out_kl" in found:
        plain = f"{found['held_out_kl_plain']:.5f} rounded to the nearest"
        figures = plain if found["is_plain"] else f"{found['held_out_kl']:.5f}, {plain}"
        rows.append(("KL on held-out windows", figures))
    return rows
