"""The main job: read, calibrate, solve, write, verify, publish."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import optgptq
from optgptq.calibration.layer import LayerCalibration, SolvedLinear
from optgptq.calibration.start import check_norm_tweaking, num_held_out, start_calibration
from optgptq.calibration_text import calibration_windows
from optgptq.checkpoint.folder import CONFIG_FILE, CheckpointFolder
from optgptq.checkpoint.manifest import describe_files, write_manifest
from optgptq.checkpoint.publish import require_disk_space, staging_folder
from optgptq.checkpoint.source import ReplacedTensors, TensorSource
from optgptq.checkpoint.writer import ShardWriter
from optgptq.data.windows import Windows
from optgptq.formats import CheckpointFormat, format_named
from optgptq.formats.checkpoint import copy_dense, plan_entries, write_side_files
from optgptq.formats.dense import require_dense
from optgptq.formats.verify import verify_written, weight_digest
from optgptq.gqa.convert import GroupedModel
from optgptq.gqa.job import group_into, grouping_warnings, remove_heads
from optgptq.gqa.plan import plan_grouping
from optgptq.gqa.source import grouped_source
from optgptq.job_record import JobRecord
from optgptq.memory import peak_memory_bytes, return_free_memory
from optgptq.models.checks import check_inventory
from optgptq.models.loading import load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.native.library import native_name
from optgptq.plan import outer_layouts, plan_linears
from optgptq.recipe.loading import recipe_for_record
from optgptq.recipe.records import Recipe
from optgptq.reports import events
from optgptq.reports.events import ProgressListener, ignore_progress
from optgptq.runtime.device import compute_dtype, require_device
from optgptq.transforms.checks import transform_warnings
from optgptq.transforms.settings import TransformSettings
from optgptq.transforms.source import transformed_source

# Safetensors headers, JSON files and the copies of small files, beside the tensors themselves.
_SMALL_FILES_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """What a job made.

    Attributes:
        output: the checkpoint.
        seconds: wall time.
        peak_memory_bytes: highest resident memory of the process.
        bits_per_weight: codes, scales and zero points over the quantized weights.
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
        digests = job.run(staging.path)
        progress(events.PhaseStarted(name="verifying", detail="reading back every tensor"))
        verify_written(CheckpointFolder.open(staging.path), job.tensors, job.layouts, digests)
        manifest = job.manifest()
        if job.grouped is not None:
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
        self.source = source
        self.recipe = recipe
        self.device = require_device(device)
        self.progress = progress
        self.form: CheckpointFormat = format_named(recipe.export.format)
        require_dense(source)
        self.original_spec = model_spec(source)
        check_inventory(source, self.original_spec)
        self.grouping = plan_grouping(source, self.original_spec, recipe)
        # What is quantized; the same as the source where neither heads are grouped nor a transform is asked.
        self.tensors, self.spec = self._quantized_source(
            source if self.grouping is None else grouped_source(source, self.grouping)
        )
        check_norm_tweaking(self.spec, recipe)
        self.plans = plan_linears(self.spec, recipe, self.form)
        self.layouts = [*(plan.layout for plan in self.plans), *outer_layouts(self.spec)]
        weight_dtype = self.tensors.info(f"{self.plans[0].info.name}.weight").torch_dtype
        self.dtype = compute_dtype(weight_dtype, self.device, wanted=recipe.calibration.compute_dtype)
        self.scale_dtype = self.form.scale_dtype(weight_dtype)
        self.record = JobRecord(zero_points_stored=self.form.stores_symmetric_zero_points)
        self.record.dense += [
            {"name": layout.name, "reason": layout.dense_reason} for layout in outer_layouts(self.spec)
        ]
        self.windows: Windows | None = None
        self.grouped: GroupedModel | None = None

    @torch.no_grad()
    def run(self, folder: Path) -> dict[str, str]:
        """Write the whole checkpoint but for its manifest into `folder`; return the digest of each quantized weight."""
        self._announce()
        entries = plan_entries(self.tensors, self.layouts, self.form)
        require_disk_space(folder, sum(entry.num_bytes for entry in entries) + _SMALL_FILES_BYTES)
        self.windows = windows = self._read_windows()
        self._group_heads(windows, folder)
        writer = ShardWriter(folder, entries, max_shard_bytes=self.recipe.export.max_shard_bytes)
        digests: dict[str, str] = {}
        norm_tensors: dict[str, torch.Tensor] = {}
        calibration = start_calibration(
            self.tensors,
            self.spec,
            self.recipe,
            windows,
            dtype=self.dtype,
            device=self.device,
            stage_started=lambda index, stage: self.progress(events.StageStarted(layer_index=index, stage=stage)),
        )
        for index in range(self.spec.num_layers):
            layer_started = time.perf_counter()
            self.progress(events.DecoderLayerStarted(index=index))
            layer = load_layer(self.tensors, self.spec, index, dtype=self.dtype, device=self.device)
            plans = [plan for plan in self.plans if plan.info.layer_index == index]
            for solved in calibration.run(layer, plans):
                self._write(solved, writer, digests)
            del layer
            return_free_memory()
            if calibration.norm_tweak is not None:
                norm_tensors |= calibration.norm_tweak.tensors
            self._finish_layer(index, calibration, time.perf_counter() - layer_started)
        self.progress(events.PhaseStarted(name="writing", detail="dense tensors and side files"))
        if norm_tensors:
            # From here on, what is written and what it is compared with.
            self.tensors = ReplacedTensors(source=self.tensors, replacements=norm_tensors)
        copy_dense(self.tensors, writer, self.layouts)
        writer.finish()
        write_side_files(self.tensors, folder, self.form, self.layouts)
        return digests

    def manifest(self) -> dict[str, Any]:
        """Return the content of the manifest: everything that decides the bytes, and what came of it."""
        assert self.windows is not None
        return {
            "optgptq": optgptq.__version__,
            "recipe": recipe_for_record(self.recipe),
            "model": {"files": describe_files(self.source.path, self._source_files())},
            "calibration": {
                "tokens_sha256": self.windows.sha256,
                "num_windows": self.windows.num_windows,
                "window_size": self.windows.window_size,
                "num_tokens": self.windows.num_tokens,
                "remainder_tokens": self.windows.remainder_tokens,
                "compute_dtype": str(self.dtype).removeprefix("torch."),
                "num_held_out": num_held_out(self.recipe, self.windows.num_windows),
                "notes": list(self.windows.notes),
            },
            "device": self.device.type,
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "native": native_name(),
            },
            **({} if self.grouped is None else {"gqa": self.grouped.record}),
            "bits_per_weight": self.record.bits_per_weight,
            "layers": self.record.layers,
            "dense": self.record.dense,
            "decoder_layers": self.record.decoder_layers,
            "warnings": self.record.warnings,
        }

    def _source_files(self) -> list[str]:
        return sorted((CONFIG_FILE, *self.source.weight_files, *self.source.side_files))

    def _announce(self) -> None:
        title = f"{self.spec.num_layers} decoder layers, {self.recipe.name or 'recipe'}, {self.form.name}"
        self.progress(
            events.JobStarted(title=title, num_decoder_layers=self.spec.num_layers, num_linears=len(self.plans))
        )
        for warning in self.form.check(self.layouts, scale_dtype=self.scale_dtype):
            self._warn(warning)
        told = () if self.grouping is None else grouping_warnings(self.grouping, self.recipe)
        for warning in (*told, *transform_warnings(self.original_spec, _transform_settings(self.recipe))):
            self._warn(warning)

    def _quantized_source(self, source: TensorSource) -> tuple[TensorSource, DecoderSpec]:
        spec = self.original_spec if self.grouping is None else self.grouping.new_spec
        return transformed_source(source, spec, _transform_settings(self.recipe))

    def _group_heads(self, windows: Windows, folder: Path) -> None:
        if self.grouping is None:
            return
        self.grouped = group_into(
            self.source,
            self.grouping,
            self.recipe,
            windows,
            folder,
            dtype=self.dtype,
            device=self.device,
            progress=self.progress,
        )
        self.tensors, self.spec = self._quantized_source(self.grouped.source)

    def _read_windows(self) -> Windows:
        self.progress(events.PhaseStarted(name="calibration text", detail=self.recipe.calibration.source))
        windows, warnings = calibration_windows(
            self.source, self.original_spec, self.recipe.calibration, dtype=self.dtype, device=str(self.device)
        )
        for warning in warnings:
            self._warn(warning)
        return windows

    def _write(self, solved: SolvedLinear, writer: ShardWriter, digests: dict[str, str]) -> None:
        layout, solution = solved.plan.layout, solved.solution
        # Checkpoints may keep some linears in another dtype than the rest.
        dense_dtype = self.tensors.info(f"{layout.name}.weight").torch_dtype
        weight = None if solution is None else solution.weight.with_scale_dtype(self.form.scale_dtype(dense_dtype))
        self.record.add_linear(solved, weight)
        if weight is not None:
            digests[layout.name] = weight_digest(weight)
            for name, tensor in self.form.encode(layout, weight).items():
                writer.write(name, tensor)
        self.progress(
            events.LinearFinished(
                layer_index=solved.plan.info.layer_index,
                name=layout.name,
                out_features=layout.out_features,
                in_features=layout.in_features,
                bits=layout.bits,
                loss=None if solution is None else solution.loss,
                rtn_loss=None if solution is None else solution.rtn_loss,
                seconds=0.0 if solution is None else solution.seconds,
            )
        )

    def _finish_layer(self, index: int, calibration: LayerCalibration, seconds: float) -> None:
        error = calibration.output_error()
        self.record.add_decoder_layer(index, error, calibration.norm_tweak)
        if calibration.norm_tweak is not None and not calibration.norm_tweak.tensors:
            self._warn(f"decoder layer {index}: its norms stay, since training them did not lower the held-out error")
        self.record.timings[f"decoder layer {index}"] = seconds
        self.progress(
            events.DecoderLayerFinished(
                index=index, seconds=seconds, output_error=error, peak_memory_bytes=peak_memory_bytes()
            )
        )

    def _warn(self, message: str) -> None:
        self.record.warnings.append(message)
        self.progress(events.WarningRaised(message=message))


def _transform_settings(recipe: Recipe) -> TransformSettings:
    transform = recipe.transform
    return TransformSettings(
        fold_norms=transform.fold_norms,
        residual_rotation=transform.residual_rotation,
        value_rotation=transform.value_rotation,
        seed=transform.seed,
    )
