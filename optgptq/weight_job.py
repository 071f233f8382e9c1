"""The walk over the decoder layers: each is read, calibrated, solved and written when its turn comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from optgptq.calibration.layer import LayerCalibration, SolvedLinear
from optgptq.calibration.start import start_calibration
from optgptq.calibration.stream import ActivationStream
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.source import ReplacedTensors, TensorSource
from optgptq.checkpoint.writer import ShardWriter, TensorEntry
from optgptq.data.windows import Windows
from optgptq.errors import ModelError
from optgptq.formats import CheckpointFormat
from optgptq.formats.checkpoint import copy_dense, plan_entries, write_side_files
from optgptq.formats.dense import verify_dense
from optgptq.formats.fp8_scales import Strategy, add_fp8_scheme, fp8_entries, fp8_scheme, fp8_tensors
from optgptq.formats.verify import verify_folder, weight_digest
from optgptq.job_record import JobRecord
from optgptq.kv_calibration.statistics import window_heads
from optgptq.layout import LinearLayout
from optgptq.memory import peak_memory_bytes, return_free_memory
from optgptq.models.checks import check_inventory
from optgptq.models.layer import DecoderLayer
from optgptq.models.loading import load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.plan import LinearPlan
from optgptq.recipe.records import Recipe
from optgptq.reports import events
from optgptq.reports.events import ProgressListener


@dataclass(slots=True, kw_only=True, eq=False)
class WeightJob:
    """What is quantized, how, and what came of it.

    Attributes:
        tensors: dense weights; after `run` those that were written as they are, trained norms included.
        spec: the model in it.
        recipe, form, plans, layouts: what was decided.
        dtype, device: of the computation.
        progress: hears of every linear and decoder layer.
        record: grows.
        warn: takes a sentence for the user.
        digests: of each quantized weight by name, as its solver left it.
    """

    tensors: TensorSource
    spec: DecoderSpec
    recipe: Recipe
    form: CheckpointFormat
    plans: Sequence[LinearPlan]
    layouts: Sequence[LinearLayout]
    dtype: torch.dtype
    device: torch.device
    progress: ProgressListener
    record: JobRecord
    warn: Callable[[str], None]
    digests: dict[str, str] = field(default_factory=dict)

    def run(self, windows: Windows, folder: Path) -> None:
        """Write the whole checkpoint but for its manifest into `folder`.

        Raises:
            OptGPTQError: one of its kinds.
        """
        entries = [*plan_entries(self.tensors, self.layouts, self.form), *self.scale_entries()]
        writer = ShardWriter(folder, entries, max_shard_bytes=self.recipe.export.max_shard_bytes)
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
            start = _copied(calibration.quantized)
            for solved in calibration.run(layer, plans):
                self._write(solved, writer)
            self._write_scales(start, layer, writer)
            del layer, start
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
        if self._fp8_strategy is not None:
            add_fp8_scheme(folder, fp8_scheme(self._fp8_strategy))

    def scale_entries(self) -> tuple[TensorEntry, ...]:
        """Return the tensors for an fp8 cache of other engines; none where they are not asked for."""
        if self._fp8_strategy is None:
            return ()
        modules = [self._attention_module(index) for index in range(self.spec.num_layers)]
        return fp8_entries(modules, strategy=self._fp8_strategy, num_kv_heads=self.spec.num_kv_heads)

    @property
    def _fp8_strategy(self) -> Strategy | None:
        strategies: dict[str, Strategy | None] = {"off": None, "tensor": "tensor", "head": "attn_head"}
        return strategies[self.recipe.kv_cache.fp8_scales]

    def _attention_module(self, index: int) -> str:
        (output,) = self.spec.linear_names(index, "o")
        return output.rpartition(".")[0]

    def _write_scales(self, start: ActivationStream, layer: DecoderLayer, writer: ShardWriter) -> None:
        """Write the scales of a layer whose weights are quantized; `start`: the windows before it."""
        if self._fp8_strategy is None:
            return
        maxima = [
            (key_KSD.abs().amax((1, 2)), value_KSD.abs().amax((1, 2)))
            for window, (_, key_KSD, value_KSD) in window_heads(start, layer)
            if window < self.recipe.kv_cache.num_windows
        ]
        keys, values = (torch.stack(parts).amax(0) for parts in zip(*maxima, strict=True))
        module = self._attention_module(layer.index)
        for name, tensor in fp8_tensors([module], [keys], [values], strategy=self._fp8_strategy).items():
            writer.write(name, tensor)

    def _write(self, solved: SolvedLinear, writer: ShardWriter) -> None:
        layout, solution = solved.plan.layout, solved.solution
        # Checkpoints may keep some linears in another dtype than the rest.
        dense_dtype = self.tensors.info(f"{layout.name}.weight").torch_dtype
        weight = None if solution is None else solution.weight.with_scale_dtype(self.form.scale_dtype(dense_dtype))
        self.record.add_linear(solved, weight)
        if weight is not None:
            self.digests[layout.name] = weight_digest(weight)
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
            self.warn(f"decoder layer {index}: its norms stay, since training them did not lower the held-out error")
        self.record.timings[f"decoder layer {index}"] = seconds
        self.progress(
            events.DecoderLayerFinished(
                index=index, seconds=seconds, output_error=error, peak_memory_bytes=peak_memory_bytes()
            )
        )


def verify_copy(folder: Path, source: TensorSource) -> None:
    """Read back a model whose weights stay as `source` has them, and compare.

    Raises:
        FormatError: something differs.
        ModelError: a weight is not finite, or no tensor of the model.
    """
    written = CheckpointFolder.open(folder)
    check_inventory(written, model_spec(written))
    verify_dense(written, source)
    problems = verify_folder(written).problems
    if problems:
        raise ModelError(
            f"{source.path}, {problems[0].where}",
            expected=problems[0].expected,
            found=problems[0].found,
            action="Download or convert the model again; `optgptq verify` lists all problems.",
        )


def _copied(stream: ActivationStream) -> ActivationStream:
    """Return a stream that stays at this place while the other moves on."""
    return ActivationStream([replace(batch, kept_input_BSI=None) for batch in stream.batches], stream.context)
