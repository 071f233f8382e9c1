"""One decoder layer: measured, solved and left behind by both streams.

The quantized stream runs through the layers as they have been quantized so far; the full-precision stream runs through
the original ones. Moments are taken from the stream that the recipe names, stage by stage, so that each stage is
measured behind the stages before it as they were quantized (the true-sequential order), or all in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from optgptq.calibration.moments import InputMoment
from optgptq.calibration.stream import ActivationStream, output_error
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear
from optgptq.models.spec import STAGE_NAMES, StageName
from optgptq.plan import LinearPlan
from optgptq.solvers import SOLVERS, LayerProblem, LayerSolution, SolverSettings
from optgptq.solvers.stacking import solve_together


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSettings:
    """How decoder layers are measured and solved.

    Attributes:
        solver: settings of every solve.
        moment_dtype: accumulator of the moments.
        true_sequential: stage by stage; False measures all stages in one pass.
        measure_full_precision: moments come from the full-precision stream.
    """

    solver: SolverSettings
    moment_dtype: torch.dtype
    true_sequential: bool
    measure_full_precision: bool


@dataclass(frozen=True, slots=True, eq=False)
class SolvedLinear:
    """A linear of the layer and its solution; None where it stays dense."""

    plan: LinearPlan
    solution: LayerSolution | None


class LayerCalibration:
    """The two streams at one place in the model, and how to take them through the next decoder layer."""

    def __init__(
        self,
        quantized: ActivationStream,
        full_precision: ActivationStream | None,
        settings: LayerSettings,
        *,
        stage_started: Callable[[int, StageName], None],
    ) -> None:
        self.quantized = quantized
        self.full_precision = full_precision
        self.settings = settings
        self._stage_started = stage_started

    def run(self, layer: DecoderLayer, plans: Sequence[LinearPlan]) -> Iterator[SolvedLinear]:
        """Yield the linears of `layer` as they are solved; its weights are replaced and both streams moved on.

        Raises:
            NumericalError: activations are not finite, or a moment cannot be factored.
        """
        original = layer.copy()
        stages = {stage: [plan for plan in plans if plan.info.stage == stage] for stage in STAGE_NAMES}
        moments = None if self.settings.true_sequential else self._measure_all(layer, stages)
        for stage, stage_plans in stages.items():
            self._stage_started(layer.index, stage)
            moment = self._measure(original, layer, stage, stage_plans) if moments is None else moments[stage]
            yield from self._solve(layer, stage_plans, moment)
            self.quantized.advance(layer, stage)
            if self.full_precision is not None:
                self.full_precision.advance(original, stage)

    def output_error(self) -> float | None:
        """Return the relative error of the hidden states, None without a full-precision stream."""
        return None if self.full_precision is None else output_error(self.quantized, self.full_precision)

    def _measured_stream(self) -> ActivationStream:
        if self.settings.measure_full_precision and self.full_precision is not None:
            return self.full_precision
        return self.quantized

    def _measure(
        self, original: DecoderLayer, layer: DecoderLayer, stage: StageName, plans: Sequence[LinearPlan]
    ) -> InputMoment:
        stream = self._measured_stream()
        measured_layer = layer if stream is self.quantized else original
        moment = self._moment(plans, stream)
        stream.measure(measured_layer, stage, moment, reads=plans[0].info.name, keep=stage == "down")
        return moment

    def _measure_all(
        self, layer: DecoderLayer, stages: dict[StageName, list[LinearPlan]]
    ) -> dict[StageName, InputMoment]:
        stream = self._measured_stream()
        moments = {stage: self._moment(plans, stream) for stage, plans in stages.items()}
        reads = {stage: plans[0].info.name for stage, plans in stages.items()}
        stream.measure_whole_layer(layer, moments, reads=reads)
        return moments

    def _moment(self, plans: Sequence[LinearPlan], stream: ActivationStream) -> InputMoment:
        device = stream.batches[0].state.hidden_BSM.device
        return InputMoment(plans[0].info.in_features, dtype=self.settings.moment_dtype, device=device)

    def _solve(self, layer: DecoderLayer, plans: Sequence[LinearPlan], moment: InputMoment) -> Iterator[SolvedLinear]:
        mean_II = moment.mean()
        remaining = list(plans)
        while remaining:
            alike = [plan for plan in remaining if _solved_alike(plan, remaining[0])]
            remaining = [plan for plan in remaining if plan not in alike]
            if alike[0].grid is None:
                yield from (SolvedLinear(plan, None) for plan in alike)
                continue
            problems = [
                LayerProblem(
                    name=plan.info.name,
                    weight_OI=_dense_linear(layer, plan).weight_OI,
                    input_moment_II=mean_II,
                    num_tokens=moment.num_tokens,
                    grid=alike[0].grid,
                    settings=self.settings.solver,
                )
                for plan in alike
            ]
            for plan, solution in zip(alike, solve_together(SOLVERS[alike[0].method], problems), strict=True):
                dense = _dense_linear(layer, plan)
                layer.linears[plan.info.local_name] = Linear(
                    solution.weight.dequantize(dense.weight_OI.dtype), dense.bias_O
                )
                yield SolvedLinear(plan, solution)


def _solved_alike(first: LinearPlan, second: LinearPlan) -> bool:
    return first.method == second.method and first.grid == second.grid


def _dense_linear(layer: DecoderLayer, plan: LinearPlan) -> Linear:
    linear = layer.linears[plan.info.local_name]
    if not isinstance(linear, Linear):
        raise TypeError(f"{plan.info.name} is not dense")
    return linear
