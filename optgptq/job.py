"""One run of the main job: what it was asked, what it decided, and what it did so far."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import optgptq
from optgptq.cache_job import CacheJob
from optgptq.cache_request import CacheRequest, check_num_windows, check_windows, most_parameter_bytes, request_cache
from optgptq.calibration.disk_states import open_store
from optgptq.calibration.start import check_norm_tweaking, num_held_out
from optgptq.calibration.states import ActivationPlace
from optgptq.calibration_text import calibration_windows
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.publish import require_disk_space
from optgptq.data.windows import Windows
from optgptq.formats import format_named
from optgptq.formats.checkpoint import plan_entries
from optgptq.formats.dense import write_dense
from optgptq.job_key import SourceFiles, begin_or_go_on, describe_source, differences, job_key, without_marks
from optgptq.job_options import JobOptions
from optgptq.job_record import JobRecord
from optgptq.job_sessions import SessionLog, machine_warnings
from optgptq.job_source import JobSource
from optgptq.journal.store import Journal
from optgptq.layer_steps import num_layer_steps
from optgptq.native.library import native_name
from optgptq.plan import LinearPlan, outer_layouts, plan_head, plan_linears
from optgptq.recipe.loading import recipe_for_record
from optgptq.recipe.records import Recipe
from optgptq.reports import events
from optgptq.reports.error_maps import error_map, worst_linears
from optgptq.runtime.device import compute_dtype, require_device
from optgptq.transforms.kv_scales import KVScales
from optgptq.weight_job import WeightJob
from optgptq.weight_writing import verify_copy, verify_solved, write_solved

# Safetensors headers, JSON files and the copies of small files, beside the tensors themselves.
_SMALL_FILES_BYTES = 32 * 2**20


class Job:
    """Call `prepare`, `solve` and `write` in this order.

    Attributes:
        journal: keeps what is finished.
        record: what the manifest will say; complete after `write`.
        files: the files of the source, known after `prepare`.
        is_published: the job that is in the journal at the start has made its output.
    """

    def __init__(
        self,
        source: CheckpointFolder,
        recipe: Recipe,
        *,
        journal: Journal,
        sessions: SessionLog,
        options: JobOptions,
        device: str,
        is_published: bool = False,
    ) -> None:
        self.source = JobSource.open(source, recipe)
        self.recipe = recipe
        self.journal = journal
        self.sessions = sessions
        self.options = options
        self.is_published = is_published
        self.device = require_device(device)
        self.progress = sessions.hear
        self.form = format_named(recipe.export.format)
        self.cache_plan = request_cache(self.source.spec, recipe.kv_cache, weights_stay=self.keeps_weights)
        if self.cache_plan is not None and recipe.kv_cache.calibrated:
            check_num_windows(recipe.calibration.num_windows, recipe.kv_cache.num_windows)
        check_norm_tweaking(self.source.spec, recipe)
        if not self.keeps_weights:
            # Before a text is read, or written by the model: it has no more windows than that.
            num_held_out(recipe, recipe.calibration.num_windows)
        self.plans = plan_linears(self.source.spec, recipe, self.form)
        self.head = plan_head(self.source.spec, recipe, self.form)
        outer = outer_layouts(self.source.spec, self.head)
        self.layouts = [*(plan.layout for plan in self.plans), *outer]
        weight_dtype = self.source.tensors.info(f"{self.plans[0].info.name}.weight").torch_dtype
        self.dtype = compute_dtype(weight_dtype, self.device, wanted=recipe.calibration.compute_dtype)
        self.scale_dtype = self.form.scale_dtype(weight_dtype)
        self.record = JobRecord()
        if not self.keeps_weights:
            self.record.dense += [
                {"name": layout.name, "reason": layout.dense_reason} for layout in outer if layout.bits is None
            ]
        self.files: SourceFiles = {}
        self.windows: Windows | None = None
        self.weights: WeightJob | None = None
        self.cache_record: dict[str, Any] | None = None
        self.folded: tuple[KVScales, ...] = ()

    @property
    def keeps_weights(self) -> bool:
        """No weight is quantized."""
        return self.recipe.weights.method == "none"

    @torch.no_grad()
    def prepare(self) -> None:
        """Read the source's hashes and the text, and make the journal that of this job.

        Raises:
            OutputError: the journal belongs to another job.
            OptGPTQError: one of its kinds.
        """
        self._announce()
        self._require_disk_space()
        self.progress(events.PhaseStarted(name="source", detail=f"{len(self.source.folder.weight_files)} weight files"))
        self.files = describe_source(self.source.folder, self.journal)
        writes_text = self.recipe.calibration.source == "self"
        if writes_text:
            self._begin(tokens_sha256=None)
        self.windows = self._read_windows()
        if not writes_text:
            self._begin(tokens_sha256=None if self.windows is None else self.windows.sha256)

    def is_known(self) -> bool:
        """Say whether the steps in the journal are those of this job; the text is taken to be what it was."""
        kept = None if self.journal.key is None else self.journal.key.get("key")
        if not isinstance(kept, Mapping):
            return False
        self.files = describe_source(self.source.folder, self.journal)
        key = job_key(
            self.files,
            self.recipe,
            tokens_sha256=kept.get("tokens_sha256"),
            device=self.device,
            dtype=self.dtype,
        )
        return not any(differences(kept, key))

    @torch.no_grad()
    def solve(self) -> None:
        """Compute everything that is not in the journal yet.

        Raises:
            OptGPTQError: one of its kinds.
        """
        windows = self.windows
        if windows is None:
            return
        self._tell_kept()
        with self._place() as place:
            self.source.group_heads(windows, steps=self.journal, place=place, progress=self.progress)
            if self.cache_plan is not None and self.recipe.kv_cache.fold:
                self.folded = self._cache_job(self.cache_plan, place).scales_to_fold(self.source.tensors, windows)
                self.source.fold(self.folded)
        if not self.keeps_weights:
            self.weights = self._weight_job()
            self.weights.solve(windows)

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Write the whole checkpoint but for its manifest into `folder`, and compare it with what was meant.

        Raises:
            OptGPTQError: one of its kinds.
        """
        self.progress(events.PhaseStarted(name="writing", detail="all tensors and side files"))
        if self.weights is None:
            write_dense(self.source.tensors, folder, max_shard_bytes=self.recipe.export.max_shard_bytes)
            self._say_verifying()
            verify_copy(folder, self.source.tensors)
        else:
            written = write_solved(
                self.source.tensors,
                self.layouts,
                self.weights.steps,
                folder,
                self.record,
                fp8=self.weights.fp8,
                num_layers=self.source.spec.num_layers,
                max_shard_bytes=self.recipe.export.max_shard_bytes,
            )
            self._say_verifying()
            verify_solved(folder, written, self.layouts, self.record, fp8=self.weights.fp8)
        if self.cache_plan is not None:
            with self._place() as place:
                self.cache_record = self._cache_job(self.cache_plan, place).run(folder, self.windows)
            if self.cache_record["calibration"].get("is_plain"):
                self._warn("kv cache: rounded to the nearest, since calibration lost more on held-out windows")
        for warning in machine_warnings(self.sessions.sessions()):
            self._warn(warning)

    def manifest(self) -> dict[str, Any]:
        """Return the content of the manifest: everything that decides the bytes, and what came of it."""
        return {
            "optgptq": optgptq.__version__,
            "recipe": recipe_for_record(self.recipe),
            "model": {"files": without_marks(self.files)},
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

    def run_record(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Return the manifest with what two runs of one job differ in: times, memory, and runs that it took."""
        sessions = self.sessions.as_finished()
        return {
            **manifest,
            "timings": self.record.timings,
            "sessions": [
                {name: session[name] for name in ("started", "seconds", "ended", "first_layer")} for session in sessions
            ],
            "phases": [phase for session in sessions for phase in session["phases"]],
            "decoder_layer_costs": self.record.decoder_layer_costs,
            "seconds": sum(session["seconds"] for session in sessions),
            "peak_memory_bytes": max(session["peak_memory_bytes"] for session in sessions),
        }

    def error_maps(self, folder: Path) -> list[dict[str, Any]]:
        """Return maps of the worst linears of the written checkpoint: where weights are large, and where they moved."""
        written = CheckpointFolder.open(folder)
        layouts = {layout.name: layout for layout in self.layouts}
        maps = []
        for layer in worst_linears(self.record.layers):
            layout = layouts[layer["name"]]
            dense = self.source.tensors.read(f"{layout.name}.weight")
            dense_OI = dense.T if layout.stored_transposed else dense
            maps.append(error_map(dense_OI, self.form.decode(written, layout)).record(layout.name, layer["loss"]))
        return maps

    def _begin(self, *, tokens_sha256: str | None) -> None:
        key = job_key(self.files, self.recipe, tokens_sha256=tokens_sha256, device=self.device, dtype=self.dtype)
        layers = 0 if self.keeps_weights else self.source.spec.num_layers
        begin_or_go_on(
            self.journal,
            key,
            self.files,
            num_layers=layers,
            restart=self.options.restart,
            is_done=self.is_published,
        )
        planned = (self.options.plan or {}).get("peak_memory_bytes")
        self.sessions.open(self.device, planned_bytes=planned)

    def _tell_kept(self) -> None:
        finished = num_layer_steps(self.journal)
        if finished:
            told = "decoder layer 1 is finished" if finished == 1 else f"decoder layers 1 to {finished} are finished"
            self.progress(events.PhaseStarted(name="resuming", detail=told))
            self.progress(events.DecoderLayersKept(num_decoder_layers=finished))

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

    def _require_disk_space(self) -> None:
        parameters = 0 if self.cache_plan is None else most_parameter_bytes(self.source.spec)
        if self.keeps_weights:
            output = sum(info.num_bytes for info in self.source.tensors.tensors.values())
            kept = 0
        else:
            output = sum(entry.num_bytes for entry in plan_entries(self.source.tensors, self.layouts, self.form))
            kept = self._solved_bytes()
        missing = max(kept - self.journal.num_bytes, 0)
        require_disk_space(self.journal.path, output + parameters + missing + _SMALL_FILES_BYTES)

    def _solved_bytes(self) -> int:
        """Return the bytes of all quantized linears, which the journal holds beside the output."""
        return sum(
            entry.num_bytes
            for plan in self._all_plans()
            if plan.layout.bits is not None
            for entry in self.form.entries(
                plan.layout, dense_dtype=self.source.tensors.info(f"{plan.info.name}.weight").torch_dtype
            )
        )

    def _all_plans(self) -> tuple[LinearPlan, ...]:
        return self.plans if self.head is None else (*self.plans, self.head)

    def _announce(self) -> None:
        form = "dense" if self.keeps_weights else self.form.name
        title = f"{self.source.spec.num_layers} decoder layers, {self.recipe.name or 'recipe'}, {form}"
        layers, linears = (0, 0) if self.keeps_weights else (self.source.spec.num_layers, len(self._all_plans()))
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
            steps=self.journal,
        )
        for warning in warnings:
            self._warn(warning)
        if self.cache_plan is not None and kv_cache.calibrated:
            check_windows(self.cache_plan, windows.window_size)
        return windows

    def _weight_job(self) -> WeightJob:
        return WeightJob(
            tensors=self.source.tensors,
            spec=self.source.spec,
            recipe=self.recipe,
            form=self.form,
            plans=self.plans,
            head=self.head,
            dtype=self.dtype,
            device=self.device,
            journal=self.journal,
            options=self.options,
            progress=self.progress,
        )

    def _say_verifying(self) -> None:
        self.progress(events.PhaseStarted(name="verifying", detail="reading back every tensor"))

    @contextmanager
    def _place(self) -> Iterator[ActivationPlace]:
        with open_store(self.options.activations, self.journal.path) as store:
            yield ActivationPlace(dtype=self.dtype, device=self.device, store=store)

    def _cache_job(self, plan: CacheRequest, place: ActivationPlace) -> CacheJob:
        return CacheJob(
            plan=plan,
            recipe=self.recipe,
            spec=self.source.spec,
            place=place,
            progress=self.progress,
            steps=self.journal,
            folded=self.folded,
        )

    def _warn(self, message: str) -> None:
        self.record.warnings.append(message)
        self.progress(events.WarningRaised(message=message))
