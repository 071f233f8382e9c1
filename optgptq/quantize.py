"""The main job: read, calibrate, solve, write, verify, publish; interrupted, it goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.lock import work_folder
from optgptq.checkpoint.manifest import MANIFEST_FILE, write_manifest
from optgptq.checkpoint.publish import open_staging, recover_output, require_free, require_place
from optgptq.errors import OptGPTQError
from optgptq.gate_job import GateReport, check_gates, run_gates
from optgptq.job import Job
from optgptq.job_key import require_unchanged
from optgptq.job_options import JobOptions
from optgptq.job_sessions import SessionLog
from optgptq.journal.store import Journal, open_journal
from optgptq.kept_work import keep_published, published_record
from optgptq.memory import is_out_of_memory
from optgptq.recipe.records import Recipe
from optgptq.reports import events
from optgptq.reports.events import ProgressListener, ignore_progress
from optgptq.reports.run_record import build_run_record, write_run_record

__all__ = ["JobOptions", "QuantizeResult", "quantize"]

_ERROR_MAPS = "error_maps"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """What a job made.

    Attributes:
        output: the checkpoint.
        seconds: wall time of all runs that it took.
        peak_memory_bytes: highest resident memory of the process.
        bits_per_weight: codes, scales and zero points over the quantized weights; 0 where there are none.
        warnings: everything that a user must hear about; in the checkpoint's manifest too, but for those of gates.
        record: the manifest's content, and what two runs of one job differ in: timings, memory, runs.
        gates: what was found of the result, missed gates included; `gates.require_passed()` raises for them.
    """

    output: Path
    seconds: float
    peak_memory_bytes: int
    bits_per_weight: float
    warnings: tuple[str, ...]
    record: dict[str, Any]
    gates: GateReport


def quantize(
    model: Path,
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    progress: ProgressListener = ignore_progress,
    device: str = "cpu",
    options: JobOptions | None = None,
) -> QuantizeResult:
    """Quantize the model in folder `model` by `recipe` into folder `output`, which appears complete or not at all.

    What is finished is kept in a hidden folder beside `output`; after an interruption or a failure the same call goes
    on from there, to the same bytes. Gates are judged, and a run record is written, when the result is safe; a missed
    gate is told in the result and raises nothing here.

    Raises:
        OptGPTQError: one of its kinds for everything that is the user's, the machine's or the model's fault.
    """
    options = options or JobOptions()
    where = require_place(output, source=model)
    check_gates(recipe, model, device=device)
    if not work_folder(where).exists():
        require_free(where, overwrite=overwrite)
    with open_journal(work_folder(where)) as journal, SessionLog(journal, progress) as sessions:
        recover_output(where)
        record = published_record(journal, where)
        job = Job(
            CheckpointFolder.open(model),
            recipe,
            journal=journal,
            sessions=sessions,
            options=options,
            device=device,
            is_published=record is not None,
        )
        if record is None or options.restart or not job.is_known():
            # Before anything that is kept is dropped.
            require_free(where, overwrite=overwrite)
            job.prepare()
            record = _make(job, where, overwrite=overwrite)
        # The result is safe from here on. What comes before the journal goes is done again after an interruption.
        gates = run_gates(where, model, recipe, record, device=device, progress=sessions.hear)
        record = _with_gates(record, gates, journal, options)
        if options.record is not None:
            write_run_record(options.record, build_run_record(where, record))
        journal.remove()
    return QuantizeResult(
        output=output,
        seconds=record["seconds"],
        peak_memory_bytes=record["peak_memory_bytes"],
        bits_per_weight=record["bits_per_weight"],
        warnings=tuple(record["warnings"]),
        record=record,
        gates=gates,
    )


def _make(job: Job, output: Path, *, overwrite: bool) -> dict[str, Any]:
    """Do what is left of the job, publish its output and return its record."""
    job.solve()
    with open_staging(output, overwrite=overwrite) as staging:
        job.write(staging.path)
        manifest = job.manifest()
        write_manifest(staging.path, manifest)
        require_unchanged(job.source.folder, job.files)
        lacks = _keep_error_maps(job, staging.path)
        record = job.run_record({**manifest, "warnings": [*manifest["warnings"], *lacks]})
        staging.sync()
        keep_published(job.journal, staging.path / MANIFEST_FILE, record)
        staging.publish()
    job.sessions.finish()
    return record


def _with_gates(record: Mapping[str, Any], gates: GateReport, journal: Journal, options: JobOptions) -> dict[str, Any]:
    """Return the record of a published job with what was found of its output, and what was predicted."""
    maps = journal.get(_ERROR_MAPS)
    return {
        **record,
        **gates.record(),
        "error_maps": [] if maps is None else maps.facts["error_maps"],
        "warnings": [*record["warnings"], *gates.warnings],
        "plan": options.plan,
    }


def _keep_error_maps(job: Job, folder: Path) -> list[str]:
    """Keep maps of the worst linears for the run record; what prevents it stops nothing and is told, here and there."""
    try:
        job.journal.put(_ERROR_MAPS, {}, {"error_maps": job.error_maps(folder)})
    except (OptGPTQError, RuntimeError, MemoryError) as error:
        if not isinstance(error, OptGPTQError) and not is_out_of_memory(error):
            raise
        warning = f"the run record has no error maps: {error}"
        job.progress(events.WarningRaised(message=warning))
        return [warning]
    return []
