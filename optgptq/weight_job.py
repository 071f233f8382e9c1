"""The walk over the decoder layers: each is read, calibrated, solved and kept in the journal when its turn comes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from optgptq.calibration.disk_states import open_store
from optgptq.calibration.head import solve_head
from optgptq.calibration.layer import LayerCalibration, SolvedLinear, put_weights
from optgptq.calibration.spill import Spills
from optgptq.calibration.start import start_calibration
from optgptq.calibration.states import ActivationStore
from optgptq.checkpoint.source import ReplacedTensors, TensorSource
from optgptq.data.windows import Windows
from optgptq.errors import CapacityError
from optgptq.formats import CheckpointFormat
from optgptq.fp8_measure import Fp8Measure
from optgptq.job_options import JobOptions
from optgptq.job_record import decoder_layer_facts, linear_facts
from optgptq.journal.store import Journal
from optgptq.layer_steps import LayerSteps, tensors_of
from optgptq.memory import is_out_of_memory, peak_memory_bytes, resident_memory_bytes, return_free_memory
from optgptq.models.loading import load_head, load_layer
from optgptq.models.spec import DecoderSpec
from optgptq.plan import LinearPlan
from optgptq.recipe.records import Recipe
from optgptq.reports import events
from optgptq.reports.events import ProgressListener

# The step that holds how far memory has brought the windows per batch down.
_BATCHES = "batches"


@dataclass(slots=True)
class _Reached:
    """Where a walk is: the decoder layer, or one more at the output head, and its windows per batch."""

    index: int = 0
    windows_per_batch: int = 1


@dataclass(slots=True, kw_only=True, eq=False)
class WeightJob:
    """What is quantized, and how.

    Attributes:
        tensors: dense weights.
        spec: the model in it.
        recipe, form, plans: what was decided.
        head: the output head; None where it stays as it is.
        dtype, device: of the computation.
        journal: keeps what is finished.
        options: where activations are, and how often they are kept.
        progress: hears of every linear and decoder layer.
    """

    tensors: TensorSource
    spec: DecoderSpec
    recipe: Recipe
    form: CheckpointFormat
    plans: Sequence[LinearPlan]
    head: LinearPlan | None
    dtype: torch.dtype
    device: torch.device
    journal: Journal
    options: JobOptions
    progress: ProgressListener
    steps: LayerSteps = field(init=False)
    fp8: Fp8Measure | None = field(init=False)
    _spills: Spills = field(init=False)
    _shrunk: dict[int, list[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.steps = LayerSteps(self.journal, self.form, self.plans, self.head)
        self.fp8 = Fp8Measure.of(self.spec, self.recipe)
        self._spills = Spills(self.journal, share=self.options.spill_share)

    def solve(self, windows: Windows) -> None:
        """Finish every decoder layer that the journal does not have; where memory runs out, with smaller batches.

        Raises:
            OptGPTQError: one of its kinds.
        """
        limit = self._kept_limit()
        while True:
            reached = _Reached()
            try:
                with open_store(self.options.activations, self.journal.path) as store:
                    self._walk(windows, reached, store=store, limit=limit)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                limit = self._smaller_batches(reached, error)
            return_free_memory()
            torch.cuda.empty_cache()

    def _kept_limit(self) -> int | None:
        """Return the windows per batch that an earlier run came down to, and take over what it told; None for none."""
        entry = self.journal.get(_BATCHES)
        if entry is None:
            return None
        self._shrunk = {int(layer): list(sentences) for layer, sentences in entry.facts["warnings"].items()}
        limit: int = entry.facts["limit"]
        return limit

    def _smaller_batches(self, reached: _Reached, error: BaseException) -> int:
        """Return half of the windows per batch, and tell; CapacityError where there is nothing to halve."""
        index, size = reached.index, reached.windows_per_batch
        if size <= 1:
            raise CapacityError(
                f"memory, {self._place(index)}",
                expected="room for one calibration window at a time",
                found=str(error).splitlines()[0] if str(error) else type(error).__name__,
                action="Close other programs, use shorter calibration windows, or a machine with more memory.",
            ) from error
        told = f"{self._place(index)}: memory ran out with {size} calibration windows per batch, now {size // 2}"
        self._shrunk.setdefault(index, []).append(told)
        # For a run that goes on before this layer has ended.
        kept = {str(layer): sentences for layer, sentences in self._shrunk.items()}
        self.journal.put(_BATCHES, {}, {"limit": size // 2, "warnings": kept})
        self.progress(events.WarningRaised(message=told))
        return size // 2

    def _walk(self, windows: Windows, reached: _Reached, *, store: ActivationStore, limit: int | None) -> None:
        """Take both streams through the decoder layers; those that are finished are only run forward.

        `limit`: greatest number of windows per batch in layers that are not finished.
        """
        finished = [self.steps.is_finished(index) for index in range(self.spec.num_layers)]
        if not self.steps.is_head_finished():
            first, end = [*finished, False].index(False), len(finished)
        elif all(finished):
            return
        else:
            first, end = finished.index(False), len(finished) - finished[::-1].index(False)
        calibration = start_calibration(
            self.tensors,
            self.spec,
            self.recipe,
            windows,
            dtype=self.dtype,
            device=self.device,
            stage_started=lambda index, stage: self.progress(events.StageStarted(layer_index=index, stage=stage)),
            store=store,
        )
        for index in range(self._restore(first, calibration), end):
            if finished[index]:
                self._replay(index, calibration)
                continue
            if limit is not None:
                calibration.shrink_batches(limit)
            reached.index, reached.windows_per_batch = index, calibration.windows_per_batch
            self._solve_layer(index, calibration)
        if self.head is not None and not self.steps.is_head_finished():
            if limit is not None:
                calibration.shrink_batches(limit)
            reached.index, reached.windows_per_batch = self.spec.num_layers, calibration.windows_per_batch
            self._solve_head(self.head, calibration)

    def _restore(self, num_finished: int, calibration: LayerCalibration) -> int:
        """Put the streams where the newest spill was made; return the index of the layer that comes next."""
        newest = self._spills.newest(num_finished)
        if newest is None:
            return 0
        whole = LayerCalibration(
            calibration.quantized,
            calibration.full_precision,
            calibration.settings,
            stage_started=lambda index, stage: None,
        )
        for index in range(newest + 1):
            whole.shrink_batches(self._cost(index)["windows_per_batch"])
        if not self._spills.restore(newest, whole):
            return 0
        calibration.quantized, calibration.full_precision = whole.quantized, whole.full_precision
        return newest + 1

    def _replay(self, index: int, calibration: LayerCalibration) -> None:
        """Take both streams through a layer that is finished."""
        detail = f"decoder layer {index + 1}/{self.spec.num_layers}"
        self.progress(events.PhaseStarted(name="running finished layers", detail=detail))
        calibration.shrink_batches(self._cost(index)["windows_per_batch"])
        original = load_layer(self.tensors, self.spec, index, dtype=self.dtype, device=self.device)
        layer = original.copy()
        norms = tensors_of(self.steps.require_layer(index), "norms")
        if norms:
            trained = ReplacedTensors(source=self.tensors, replacements=norms)
            layer = load_layer(trained, self.spec, index, dtype=self.dtype, device=self.device)
        for weights in self.steps.known_stages(index).values():
            put_weights(layer, self._plans_of(index), weights)
        calibration.replay(layer, original)

    def _solve_layer(self, index: int, calibration: LayerCalibration) -> None:
        started = time.perf_counter()
        self.progress(events.DecoderLayerStarted(index=index))
        known = self.steps.known_stages(index)
        layer = load_layer(self.tensors, self.spec, index, dtype=self.dtype, device=self.device)
        plans = self._plans_of(index)
        start = None if self.fp8 is None else calibration.quantized.snapshot()
        solved: list[SolvedLinear] = []
        for linear in calibration.run(layer, plans, known=known):
            solved.append(linear)
            self._tell_linear(linear)
            if len(solved) == sum(plan.info.stage == linear.plan.info.stage for plan in plans):
                self.steps.put_stage(index, linear.plan.info.stage, *self._encoded(solved))
                solved = []
        scales = {} if start is None or self.fp8 is None else self.fp8.scales(start, layer)
        del layer, start
        return_free_memory()
        self._finish_layer(index, calibration, scales, started=started)

    def _solve_head(self, plan: LinearPlan, calibration: LayerCalibration) -> None:
        self.progress(events.PhaseStarted(name="output head", detail=f"{plan.info.out_features} rows"))
        head = load_head(self.tensors, self.spec, dtype=self.dtype, device=self.device)
        solved = solve_head(head, plan, calibration.measured_stream, calibration.settings)
        self._tell_linear(solved)
        self.steps.put_head(*self._encoded([solved]), self._shrunk.pop(self.spec.num_layers, ()))

    def _encoded(self, solved: Sequence[SolvedLinear]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Return the tensors of solved linears as the checkpoint will hold them, and what is told about each."""
        tensors: dict[str, torch.Tensor] = {}
        linears = []
        for linear in solved:
            layout, solution = linear.plan.layout, linear.solution
            weight = None
            if solution is not None:
                # Checkpoints may keep some linears in another dtype than the rest.
                dense_dtype = self.tensors.info(f"{layout.name}.weight").torch_dtype
                weight = solution.weight.with_scale_dtype(self.form.scale_dtype(dense_dtype))
                tensors |= self.form.encode(layout, weight)
            linears.append(
                linear_facts(
                    linear,
                    weight,
                    zero_points_stored=self.form.stores_symmetric_zero_points,
                    damp_ratio=self.recipe.weights.damp_ratio,
                )
            )
        return tensors, linears

    def _finish_layer(
        self, index: int, calibration: LayerCalibration, scales: dict[str, torch.Tensor], *, started: float
    ) -> None:
        error, tweak = calibration.output_error(), calibration.norm_tweak
        told = []
        if tweak is not None and not tweak.tensors:
            told = [f"decoder layer {index}: its norms stay, since training them did not lower the held-out error"]
        seconds, peak_bytes = time.perf_counter() - started, peak_memory_bytes()
        cost = {
            "index": index,
            "seconds": seconds,
            "resident_bytes": resident_memory_bytes(),
            "peak_bytes": peak_bytes,
            "windows_per_batch": calibration.windows_per_batch,
        }
        facts = {
            "layer": decoder_layer_facts(index, error, tweak),
            "cost": cost,
            "warnings": [*self._shrunk.pop(index, ()), *told],
        }
        norms = {} if tweak is None else dict(tweak.tensors)
        self.steps.put_layer(index, {"norms": norms, "scales": scales}, facts)
        for warning in told:
            self.progress(events.WarningRaised(message=warning))
        self.progress(
            events.DecoderLayerFinished(index=index, seconds=seconds, output_error=error, peak_memory_bytes=peak_bytes)
        )
        if index + 1 < self.spec.num_layers or self.head is not None:
            self._spills.keep(index, calibration)

    def _tell_linear(self, solved: SolvedLinear) -> None:
        layout, solution = solved.plan.layout, solved.solution
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

    def _plans_of(self, index: int) -> list[LinearPlan]:
        return [plan for plan in self.plans if plan.info.layer_index == index]

    def _place(self, index: int) -> str:
        return f"decoder layer {index}" if index < self.spec.num_layers else "output head"

    def _cost(self, index: int) -> dict[str, Any]:
        cost: dict[str, Any] = self.steps.require_layer(index).facts["cost"]
        return cost
