"""The main job: read, calibrate, solve, write, verify, publish."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import optgptq
from optgptq.cache_job import CacheJob
from optgptq.cache_plan import CachePlan, check_num_windows, check_windows, most_parameter_bytes, plan_cache
from optgptq.calibration.start import check_norm_tweaking, num_held_out
from optgptq.calibration_text import calibration_windows
from optgptq.checkpoint.folder import CONFIG_FILE, CheckpointFolder
from optgptq.checkpoint.manifest import describe_files, write_manifest
from optgptq.checkpoint.publish import require_disk_space, staging_folder
from optgptq.data.windows import Windows
from optgptq.formats import format_named
from optgptq.formats.checkpoint import plan_entries
from optgptq.formats.dense import write_dense
from optgptq.formats.verify import verify_written
from optgptq.gqa.job import remove_heads
from optgptq.job_record import JobRecord
from optgptq.job_source import JobSource
from optgptq.memory import peak_memory_bytes
from optgptq.native.library import native_name
from optgptq.plan import outer_layouts, plan_linears
from optgptq.recipe.loading import recipe_for_record
from optgptq.recipe.records import Recipe
from optgptq.reports import events
from optgptq.reports.events import ProgressListener, ignore_progress
from optgptq.runtime.device import compute_dtype, require_device
from optgptq.transforms.kv_scales import KVScales
from optgptq.weight_job import WeightJob, verify_copy

# Safetensors headers, JSON files and the copies of small files, beside the tensors themselves.
_SMALL_FILES_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """What a job made.

    Attributes:
        output: the checkpoint.
        seconds: wall time.
        peak_memory_bytes: highest resident memory of the process.
        bits_per_weight: codes, scales and zero points over the quantized weights; 0 where there are none.
        warnings: everything that a user must hear about; also in the checkpoint's manifest.
        record: the manifest's content and the timings.
    """

    output: Path
    seconds: float
    peak_memory_bytes: int
    bits_per_weight: float
    warnings: tuple[str, ...]
    record: dict[str, Any]


def quantize(
    model: Path,
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    progress: ProgressListener = ignore_progress,
    device: str = "cpu",
) -> QuantizeResult:
    """Quantize the model in folder `model` by `recipe` into folder `output`, which appears complete or not at all.

    Raises:
        OptGPTQError: one of its kinds for everything that is the user's, the machine's or the model's fault.
    """
    started = time.perf_counter()
    with staging_folder(output, overwrite=overwrite, source=model) as staging:
        job = _Job(CheckpointFolder.open(model), recipe, device=device, progress=progress)
        job.run(staging.path)
        manifest = job.manifest()
        if job.source.grouped is not None:
            remove_heads(staging.path)
        write_manifest(staging.path, manifest)
        staging.publish()
    return QuantizeResult(
        output=output,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        bits_per_weight=job.record.bits_per_weight,
        warnings=tuple(job.record.warnings),
        record={**manifest, "timings": job.record.timings},
    )


class _Job:
    """One job: what it was asked, what it decided, and what it did so far."""

    def __init__(self, source: CheckpointFolder, recipe: Recipe, *, device: str, progress: ProgressListener) -> None:
        self.source = JobSource.open(source, recipe)
        self.recipe = recipe
        self.device = require_device(device)
        self.progress = progress
        self.form = format_named(recipe.export.format)
        self.cache_plan = plan_cache(self.source.spec, recipe.kv_cache, weights_stay=self.keeps_weights)
        if self.cache_plan is not None and recipe.kv_cache.calibrated:
            check_num_windows(recipe.calibration.num_windows, recipe.kv_cache.num_windows)
        check_norm_tweaking(self.source.spec, recipe)
        self.plans = plan_linears(self.source.spec, recipe, self.form)
        self.layouts = [*(plan.layout for plan in self.plans), *outer_layouts(self.source.spec)]
        weight_dtype = self.source.tensors.info(f"{self.plans[0].info.name}.weight").torch_dtype
        self.dtype = compute_dtype(weight_dtype, self.device, wanted=recipe.calibration.compute_dtype)
        self.scale_dtype = self.form.scale_dtype(weight_dtype)
        self.record = JobRecord(zero_points_stored=self.form.stores_symmetric_zero_points)
        if not self.keeps_weights:
            self.record.dense += [
                {"name": layout.name, "reason": layout.dense_reason} for layout in outer_layouts(self.source.spec)
            ]
        self.windows: Windows | None = None
        self.cache_record: dict[str, Any] | None = None
        self.folded: tuple[KVScales, ...] = ()

    @property
    def keeps_weights(self) -> bool:
        """No weight is quantized."""
        return self.recipe.weights.method == "none"

    @torch.no_grad()
    def run(self, folder: Path) -> None:
        """Write the whole checkpoint but for its manifest into `folder`, and compare it with what was meant."""
        self._announce()
        require_disk_space(folder, self._num_bytes() + _SMALL_FILES_BYTES)
        self.windows = windows = self._read_windows()
        if windows is not None:
            self.source.group_heads(windows, folder, dtype=self.dtype, device=self.device, progress=self.progress)
            self._fold(windows)
        if self.keeps_weights or windows is None:
            self._copy_weights(folder)
        else:
            self._quantize_weights(windows, folder)
        if self.cache_plan is not None:
            self.cache_record = self._cache_job(self.cache_plan).run(folder, windows)
            if self.cache_record["calibration"].get("is_plain"):
                self._warn("kv cache: rounded to the nearest, since calibration lost more on held-out windows")

    def manifest(self) -> dict[str, Any]:
        """Return the content of the manifest: everything that decides the bytes, and what came of it."""
        source = self.source.folder
        return {
            "optgptq": optgptq.__version__,
            "recipe": recipe_for_record(self.recipe),
            "model": {
                "files": describe_files(source.path, sorted((CONFIG_FILE, *source.weight_files, *source.side_files)))
            },
            "calibration": None if self.windows is None else self._calibration_record(self.windows),
            "device": self.device.type,
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "native": native_name(),
            },
            **({} if self.source.grouped is None else {"gqa": self.source.grouped.record}),
            "bits_per_weight": self.record.bits_per_weight,
            "layers": self.record.layers,
            "dense": self.record.dense,
            "decoder_layers": self.record.decoder_layers,
            **({} if self.cache_record is None else {"kv_cache": self.cache_record}),
            "warnings": self.record.warnings,
        }

    def _calibration_record(self, windows: Windows) -> dict[str, Any]:
        return {
            "tokens_sha256": windows.sha256,
            "num_windows": windows.num_windows,
            "window_size": windows.window_size,
            "num_tokens": windows.num_tokens,
            "remainder_tokens": windows.remainder_tokens,
            "compute_dtype": str(self.dtype).removeprefix("torch."),
            "num_held_out": num_held_out(self.recipe, windows.num_windows),
            "notes": list(windows.notes),
        }

    def _num_bytes(self) -> int:
        parameters = 0 if self.cache_plan is None else most_parameter_bytes(self.source.spec)
        if self.keeps_weights:
            return parameters + sum(info.num_bytes for info in self.source.tensors.tensors.values())
        entries = plan_entries(self.source.tensors, self.layouts, self.form)
        return parameters + sum(entry.num_bytes for entry in entries)

    def _announce(self) -> None:
        form = "dense" if self.keeps_weights else self.form.name
        title = f"{self.source.spec.num_layers} decoder layers, {self.recipe.name or 'recipe'}, {form}"
        layers, linears = (0, 0) if self.keeps_weights else (self.source.spec.num_layers, len(self.plans))
        self.progress(events.JobStarted(title=title, num_decoder_layers=layers, num_linears=linears))
        told = [] if self.keeps_weights else list(self.form.check(self.layouts, scale_dtype=self.scale_dtype))
        told += self.source.warnings()
        told += () if self.cache_plan is None else self.cache_plan.notes
        for warning in told:
            self._warn(warning)

    def _read_windows(self) -> Windows | None:
        calibration, kv_cache = self.recipe.calibration, self.recipe.kv_cache
        if self.keeps_weights and self.source.grouping is None:
            if self.cache_plan is None or not kv_cache.calibrated:
                return None
            # Nobody reads more of them, and a text that the model writes takes its time.
            num_windows = min(calibration.num_windows, kv_cache.num_windows)
            calibration = calibration.model_copy(update={"num_windows": num_windows})
        self.progress(events.PhaseStarted(name="calibration text", detail=calibration.source))
        windows, warnings = calibration_windows(
            self.source.folder,
            self.source.original_spec,
            calibration,
            dtype=self.dtype,
            device=str(self.device),
            for_linears=not self.keeps_weights or self.source.grouping is not None,
        )
        for warning in warnings:
            self._warn(warning)
        if self.cache_plan is not None and kv_cache.calibrated:
            check_windows(self.cache_plan, windows.window_size)
        return windows

    def _quantize_weights(self, windows: Windows, folder: Path) -> None:
        job = WeightJob(
            tensors=self.source.tensors,
            spec=self.source.spec,
            recipe=self.recipe,
            form=self.form,
            plans=self.plans,
            layouts=self.layouts,
            dtype=self.dtype,
            device=self.device,
            progress=self.progress,
            record=self.record,
            warn=self._warn,
        )
        job.run(windows, folder)
        self._say_verifying()
        written = CheckpointFolder.open(folder)
        verify_written(written, job.tensors, self.layouts, job.digests, added=job.scale_entries())

    def _copy_weights(self, folder: Path) -> None:
        self.progress(events.PhaseStarted(name="writing", detail="all tensors and side files"))
        write_dense(self.source.tensors, folder, max_shard_bytes=self.recipe.export.max_shard_bytes)
        self._say_verifying()
        verify_copy(folder, self.source.tensors)

    def _say_verifying(self) -> None:
        self.progress(events.PhaseStarted(name="verifying", detail="reading back every tensor"))

    def _fold(self, windows: Windows) -> None:
        if self.cache_plan is not None and self.recipe.kv_cache.fold:
            self.folded = self._cache_job(self.cache_plan).scales_to_fold(self.source.tensors, windows)
            self.source.fold(self.folded)

    def _cache_job(self, plan: CachePlan) -> CacheJob:
        return CacheJob(
            plan=plan,
            recipe=self.recipe,
            spec=self.source.spec,
            dtype=self.dtype,
            device=self.device,
            progress=self.progress,
            folded=self.folded,
        )

    def _warn(self, message: str) -> None:
        self.record.warnings.append(message)
        self.progress(events.WarningRaised(message=message))
