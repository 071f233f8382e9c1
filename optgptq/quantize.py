"""The main job: read, calibrate, solve, write, verify, publish; interrupted, it goes on where it was."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.lock import work_folder
from optgptq.checkpoint.manifest import MANIFEST_FILE, sha256_file, write_manifest
from optgptq.checkpoint.publish import open_staging, recover_output, require_free, require_place
from optgptq.errors import ModelError
from optgptq.gate_job import GateReport, check_gates, run_gates
from optgptq.job import Job
from optgptq.job_key import require_unchanged
from optgptq.job_options import JobOptions
from optgptq.job_sessions import SessionLog
from optgptq.journal.store import Journal, open_journal
from optgptq.recipe.records import Recipe
from optgptq.reports.events import ProgressListener, ignore_progress
from optgptq.reports.run_record import build_run_record, write_run_record

__all__ = ["JobOptions", "QuantizeResult", "quantize"]

# The step that is kept right before the output appears under its name: SHA-256 of its manifest, and what was made.
_PUBLISHED = "published"


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
        is_published = _published(journal, where) is not None
        if not is_published:
            require_free(where, overwrite=overwrite)
        job = Job(
            CheckpointFolder.open(model),
            recipe,
            journal=journal,
            sessions=sessions,
            options=options,
            device=device,
            is_published=is_published,
        )
        job.prepare()
        record = _published(journal, where)
        if record is None:
            require_free(where, overwrite=overwrite)
            record = _make(job, where, overwrite=overwrite)
        # The result is safe from here on. What comes before the journal goes is done again after an interruption.
        gates = run_gates(where, model, recipe, record, device=device, progress=sessions.hear)
        record = {**record, **gates.record(), "warnings": [*record["warnings"], *gates.warnings], "plan": options.plan}
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
        _require_same_source(job)
        job.sessions.finish()
        record = {**job.run_record(manifest), "error_maps": job.error_maps(staging.path)}
        staging.sync()
        digest = sha256_file(staging.path / MANIFEST_FILE)
        job.journal.put(_PUBLISHED, {}, {"manifest_sha256": digest, "record": record})
        job.journal.sync()
        staging.publish()
    return record


def _published(journal: Journal, output: Path) -> dict[str, Any] | None:
    """Return the record of the job in the journal if its output stands there already, else None."""
    entry = journal.get(_PUBLISHED)
    manifest = output / MANIFEST_FILE
    if entry is None or not os.path.isfile(manifest) or sha256_file(manifest) != entry.facts["manifest_sha256"]:
        return None
    record: dict[str, Any] = entry.facts["record"]
    return record


def _require_same_source(job: Job) -> None:
    try:
        require_unchanged(job.source.folder, job.files)
    except ModelError:
        job.journal.remove()
        raise
