"""The job behind `optgptq gqa`: a dense model with fewer key/value heads, written, checked and published."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import optgptq
from optgptq.calibration_text import calibration_windows
from optgptq.checkpoint.folder import CONFIG_FILE, CheckpointFolder
from optgptq.checkpoint.manifest import describe_files, write_manifest
from optgptq.checkpoint.publish import require_disk_space, staging_folder
from optgptq.data.windows import Windows
from optgptq.errors import RecipeError
from optgptq.formats.dense import require_dense, verify_dense, write_dense
from optgptq.gqa.convert import GroupedModel
from optgptq.gqa.job import group_into, grouping_warnings, remove_heads
from optgptq.gqa.plan import GroupingPlan, plan_grouping
from optgptq.gqa.source import grouped_source
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


def group_model(
    model: Path,
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    progress: ProgressListener = ignore_progress,
    device: str = "cpu",
) -> GroupResult:
    """Merge key/value heads of the dense model in folder `model`, as the recipe's sections `gqa` and `calibration` say.

    Raises:
        OptGPTQError: one of its kinds for everything that is the user's, the machine's or the model's fault.
    """
    started = time.perf_counter()
    source = CheckpointFolder.open(model)
    with staging_folder(output, overwrite=overwrite, source=model) as staging:
        plan = _plan(source, recipe)
        warnings = list(grouping_warnings(plan, recipe))
        grouped, windows = _convert(source, plan, recipe, staging.path, warnings, progress=progress, device=device)
        for warning in warnings:
            progress(events.WarningRaised(message=warning))
        progress(events.PhaseStarted(name="writing", detail="all tensors and side files"))
        write_dense(grouped.source, staging.path, max_shard_bytes=recipe.export.max_shard_bytes)
        progress(events.PhaseStarted(name="verifying", detail="reading back every tensor"))
        written = CheckpointFolder.open(staging.path)
        check_inventory(written, model_spec(written))
        verify_dense(written, grouped.source)
        remove_heads(staging.path)
        write_manifest(staging.path, _manifest(source, recipe, windows, grouped, warnings))
        staging.publish()
    return GroupResult(
        output=output,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        record=grouped.record,
        warnings=tuple(warnings),
    )


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
    staging: Path,
    warnings: list[str],
    *,
    progress: ProgressListener,
    device: str,
) -> tuple[GroupedModel, Windows]:
    where = require_device(device)
    stored_dtype = source.info(plan.entries[0].name).torch_dtype
    dtype = compute_dtype(stored_dtype, where, wanted=recipe.calibration.compute_dtype)
    view = grouped_source(source, plan)
    num_bytes = sum(info.num_bytes for info in view.tensors.values())
    num_bytes += sum(entry.num_bytes for entry in plan.entries)
    require_disk_space(staging, num_bytes + _SMALL_FILES_BYTES)
    progress(events.PhaseStarted(name="calibration text", detail=recipe.calibration.source))
    with torch.no_grad():
        windows, told = calibration_windows(source, plan.spec, recipe.calibration, dtype=dtype, device=str(where))
    warnings += told
    grouped = group_into(source, plan, recipe, windows, staging, dtype=dtype, device=where, progress=progress)
    return grouped, windows


def _manifest(
    source: CheckpointFolder, recipe: Recipe, windows: Windows, grouped: GroupedModel, warnings: list[str]
) -> dict[str, Any]:
    plain = recipe_for_record(recipe)
    names = sorted((CONFIG_FILE, *source.weight_files, *source.side_files))
    return {
        "optgptq": optgptq.__version__,
        "recipe": {key: plain[key] for key in ("gqa", "calibration")},
        "model": {"files": describe_files(source.path, names)},
        "calibration": {
            "tokens_sha256": windows.sha256,
            "num_windows": windows.num_windows,
            "window_size": windows.window_size,
            "notes": list(windows.notes),
        },
        "gqa": grouped.record,
        "warnings": warnings,
    }
