"""The job behind `optgptq gqa`: a dense model with fewer key/value heads, written, checked and published."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import optgptq
from optgptq.calibration.disk_states import Activations, open_store
from optgptq.calibration.states import ActivationPlace
from optgptq.calibration_text import calibration_windows
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.lock import work_folder
from optgptq.checkpoint.manifest import MANIFEST_FILE, write_manifest
from optgptq.checkpoint.publish import open_staging, recover_output, require_disk_space, require_free, require_place
from optgptq.data.windows import Windows
from optgptq.errors import RecipeError
from optgptq.formats.dense import require_dense, verify_dense, write_dense
from optgptq.gqa.convert import GroupedModel
from optgptq.gqa.job import group_into, grouping_warnings
from optgptq.gqa.plan import GroupingPlan, plan_grouping
from optgptq.gqa.source import grouped_source
from optgptq.job_key import (
    SourceFiles,
    begin_or_go_on,
    describe_source,
    differences,
    job_key,
    require_unchanged,
    without_marks,
)
from optgptq.job_options import JobOptions
from optgptq.job_source import source_cache_warnings
from optgptq.journal.store import Journal, open_journal
from optgptq.kept_work import GROUPING_JOB, keep_published, published_record
from optgptq.memory import peak_memory_bytes
from optgptq.models.checks import check_inventory
from optgptq.models.registry import model_spec
from optgptq.recipe.loading import recipe_for_record
from optgptq.recipe.records import Recipe
from optgptq.reports import events
from optgptq.reports.events import ProgressListener, ignore_progress
from optgptq.runtime.device import compute_dtype, require_device

# Safetensors headers, JSON files and the copies of small files, beside the tensors themselves.
_SMALL_FILES_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """What a job made.

    Attributes:
        output: the dense model with fewer key/value heads.
        seconds: wall time.
        peak_memory_bytes: highest resident memory of the process.
        record: what was done to the heads, perplexity and bytes included (docs/formats/manifest.md).
        warnings: everything that a user must hear about; also in the manifest.
    """

    output: Path
    seconds: float
    peak_memory_bytes: int
    record: Mapping[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Converted:
    """The new model, the text that it was measured on, and the files that were read."""

    grouped: GroupedModel
    windows: Windows
    files: SourceFiles


def group_model(
    model: Path,
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: ProgressListener = ignore_progress,
    device: str = "cpu",
    activations: Activations = "memory",
) -> GroupResult:
    """Merge key/value heads of the dense model in folder `model`, as the recipe's sections `gqa` and `calibration` say.

    What is finished is kept beside `output`, and the same call goes on from there; `restart` drops it. Between two
    stages, activations are in memory or in a file beside `output`, as `activations` says.

    Raises:
        OptGPTQError: one of its kinds for everything that is the user's, the machine's or the model's fault.
    """
    started = time.perf_counter()
    where = require_place(output, source=model)
    if not work_folder(where).exists():
        require_free(where, overwrite=overwrite)
    with open_journal(work_folder(where)) as journal:
        recover_output(where)
        done = published_record(journal, where)
        source = CheckpointFolder.open(model)
        plan = _plan(source, recipe)
        if done is not None and not restart and _is_known(journal, source, plan, recipe, device=device):
            # The process died between the two last steps: what it made is there.
            journal.remove()
            return _result(output, done)
        require_free(where, overwrite=overwrite)
        warnings = [*grouping_warnings(plan, recipe), *source_cache_warnings(source)]
        options = JobOptions(restart=restart, activations=activations)
        if done is not None:
            # Its output is there, and may be replaced: nothing that is kept is of use to anybody.
            journal.clear()
        converted = _convert(source, plan, recipe, journal, warnings, progress=progress, device=device, options=options)
        for warning in warnings:
            progress(events.WarningRaised(message=warning))
        with open_staging(where, overwrite=overwrite) as staging:
            grouped = converted.grouped
            _write(grouped, staging.path, recipe, progress)
            write_manifest(staging.path, _manifest(converted, recipe, warnings))
            require_unchanged(source, converted.files)
            staging.sync()
            told = {
                "seconds": time.perf_counter() - started,
                "peak_memory_bytes": peak_memory_bytes(),
                "record": grouped.record,
                "warnings": warnings,
            }
            keep_published(journal, staging.path / MANIFEST_FILE, told)
            staging.publish()
        journal.remove()
    return _result(output, told)


def _result(output: Path, told: Mapping[str, Any]) -> GroupResult:
    return GroupResult(
        output=output,
        seconds=told["seconds"],
        peak_memory_bytes=told["peak_memory_bytes"],
        record=told["record"],
        warnings=tuple(told["warnings"]),
    )


def _write(grouped: GroupedModel, folder: Path, recipe: Recipe, progress: ProgressListener) -> None:
    """Write the model but for its manifest, and compare it with what was meant."""
    progress(events.PhaseStarted(name="writing", detail="all tensors and side files"))
    write_dense(grouped.source, folder, max_shard_bytes=recipe.export.max_shard_bytes)
    progress(events.PhaseStarted(name="verifying", detail="reading back every tensor"))
    written = CheckpointFolder.open(folder)
    check_inventory(written, model_spec(written))
    verify_dense(written, grouped.source)


def _plan(source: CheckpointFolder, recipe: Recipe) -> GroupingPlan:
    require_dense(source)
    spec = model_spec(source)
    check_inventory(source, spec)
    plan = plan_grouping(source, spec, recipe)
    if plan is None:
        raise RecipeError(
            "gqa.group",
            expected="2 or more, the key/value heads that become one",
            found="1, which leaves the model as it is",
            action="Give --group 2, or a recipe that sets gqa.group.",
        )
    return plan


def _convert(
    source: CheckpointFolder,
    plan: GroupingPlan,
    recipe: Recipe,
    journal: Journal,
    warnings: list[str],
    *,
    progress: ProgressListener,
    device: str,
    options: JobOptions,
) -> _Converted:
    where = require_device(device)
    dtype = _dtype(source, plan, recipe, where)
    view = grouped_source(source, plan)
    num_bytes = sum(info.num_bytes for info in view.tensors.values())
    num_bytes += sum(entry.num_bytes for entry in plan.entries)
    require_disk_space(journal.path, num_bytes + _SMALL_FILES_BYTES)
    files = describe_source(source, journal)
    writes_text = recipe.calibration.source == "self"

    def begin(tokens_sha256: str | None) -> None:
        key = _key(files, recipe, tokens_sha256=tokens_sha256, device=where, dtype=dtype)
        begin_or_go_on(journal, key, files, num_layers=plan.spec.num_layers, restart=options.restart, is_done=False)

    if writes_text:
        begin(None)
    progress(events.PhaseStarted(name="calibration text", detail=recipe.calibration.source))
    with torch.no_grad():
        windows, told = calibration_windows(
            source, plan.spec, recipe.calibration, dtype=dtype, device=str(where), steps=journal
        )
    if not writes_text:
        begin(windows.sha256)
    warnings += told
    with open_store(options.activations, journal.path) as store:
        place = ActivationPlace(dtype=dtype, device=where, store=store)
        grouped = group_into(source, plan, recipe, windows, steps=journal, place=place, progress=progress)
    return _Converted(grouped=grouped, windows=windows, files=files)


def _is_known(journal: Journal, source: CheckpointFolder, plan: GroupingPlan, recipe: Recipe, *, device: str) -> bool:
    """Say whether what is in the journal is of this job; the text is taken to be what it was."""
    kept = None if journal.key is None else journal.key.get("key")
    if not isinstance(kept, Mapping):
        return False
    where = require_device(device)
    key = _key(
        describe_source(source, journal),
        recipe,
        tokens_sha256=kept.get("tokens_sha256"),
        device=where,
        dtype=_dtype(source, plan, recipe, where),
    )
    return not any(differences(kept, key))


def _key(
    files: SourceFiles, recipe: Recipe, *, tokens_sha256: str | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    key = job_key(files, recipe, tokens_sha256=tokens_sha256, device=device, dtype=dtype)
    return {**key, "recipe": {name: key["recipe"][name] for name in ("gqa", "calibration")}, "job": GROUPING_JOB}


def _dtype(source: CheckpointFolder, plan: GroupingPlan, recipe: Recipe, device: torch.device) -> torch.dtype:
    stored = source.info(plan.entries[0].name).torch_dtype
    return compute_dtype(stored, device, wanted=recipe.calibration.compute_dtype)


def _manifest(converted: _Converted, recipe: Recipe, warnings: list[str]) -> dict[str, Any]:
    plain, windows = recipe_for_record(recipe), converted.windows
    return {
        "optgptq": optgptq.__version__,
        "recipe": {key: plain[key] for key in ("gqa", "calibration")},
        "model": {"files": without_marks(converted.files)},
        "calibration": {
            "tokens_sha256": windows.sha256,
            "num_windows": windows.num_windows,
            "window_size": windows.window_size,
            "notes": list(windows.notes),
        },
        "gqa": converted.grouped.record,
        "warnings": warnings,
    }
