"""One decoder layer: measured, solved and left behind by both streams.

The quantized stream runs through the layers as they have been quantized so far; the full-precision stream runs through
the original ones. Moments are taken from the stream that the recipe names, stage by stage, so that each stage is
measured behind the stages before it as they were quantized (the true-sequential order), or all in one pass. Where a
target shift is asked, both streams hold the same windows, and what lies between them moves the target of every linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch

from optgptq.calibration.attention_stage import AttentionSettings, AttentionStage
from optgptq.calibration.measure import measure_stage
from optgptq.calibration.moments import InputMoment
from optgptq.calibration.norm_tweaking import NormTweak, NormTweakSettings, tweak_norms
from optgptq.calibration.smaller_batches import with_smaller_batches
from optgptq.calibration.statistics import StageStatistics
from optgptq.calibration.stream import ActivationStream, output_error
from optgptq.calibration.targets import ShiftSettings, Target, shifted_targets
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear
from optgptq.models.spec import STAGE_NAMES, StageName
from optgptq.plan import LinearPlan
from optgptq.quantized_weight import QuantizedWeight
from optgptq.solvers import METHODS, LayerProblem, LayerSolution, Solver, SolverSettings, gptaq
from optgptq.solvers.stacking import solve_together

KnownStages = Mapping[StageName, Mapping[str, QuantizedWeight]]
"""Stages that were solved before: their quantized weights by the full name of the linear; dense ones are left out."""

_NOTHING_KNOWN: KnownStages = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSettings:
    """How decoder layers are measured and solved.

    Attributes:
        solver: settings of every solve.
        moment_dtype: accumulator of the moments.
        true_sequential: stage by stage; False measures all stages in one pass.
        measure_full_precision: moments come from the full-precision stream.
        shift: how targets are shifted; None for not at all. It needs the true-sequential order, moments of the
            quantized stream, and a full-precision stream of the same windows.
        attention: what of attention the methods that see it are shown; None for nothing.
        norm_tweaking: how norms are trained behind the linears; None for not at all. It needs a full-precision stream
            of the same windows, some of them held out.
    """

    solver: SolverSettings
    moment_dtype: torch.dtype
    true_sequential: bool
    measure_full_precision: bool
    shift: ShiftSettings | None = None
    attention: AttentionSettings | None = None
    norm_tweaking: NormTweakSettings | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SolvedLinear:
    """A linear of the layer and its solution; None where it stays dense.

    `shift_strength` is the share of the full target shift that was taken, None without one; the mean over the rows
    where value heads have shifts of their own. `num_tokens` are behind its moment, 0 where none was asked.
    """

    plan: LinearPlan
    solution: LayerSolution | None
    shift_strength: float | None = None
    num_tokens: int = 0


class LayerCalibration:
    """The two streams at one place in the model, and how to take them through the next decoder layer.

    `norm_tweak` is what training the norms of the last layer brought, None where it was not asked.
    """

    def __init__(
        self,
        quantized: ActivationStream,
        full_precision: ActivationStream | None,
        settings: LayerSettings,
        *,
        stage_started: Callable[[int, StageName], None],
    ) -> None:
        if (settings.shift is not None or settings.norm_tweaking is not None) and full_precision is None:
            raise ValueError("a target shift or norm tweaking needs a full-precision stream")
        self.quantized = quantized
        self.full_precision = full_precision
        self.settings = settings
        self.norm_tweak: NormTweak | None = None
        self._stage_started = stage_started

    def run(
        self, layer: DecoderLayer, plans: Sequence[LinearPlan], *, known: KnownStages = _NOTHING_KNOWN
    ) -> Iterator[SolvedLinear]:
        """Yield the linears of `layer` as they are solved; its weights are replaced and both streams moved on.

        Stages in `known` are neither measured nor solved, and nothing is yielded for them.

        Raises:
            NumericalError: activations are not finite, or a moment cannot be factored.
        """
        original = layer.copy()
        tweaking = self.settings.norm_tweaking
        start = self.quantized.snapshot() if tweaking is not None else None
        stages = {stage: [plan for plan in plans if plan.info.stage == stage] for stage in STAGE_NAMES}
        one_pass = not self.settings.true_sequential and len(known) < len(stages)
        measured = self._measure_all(layer, stages) if one_pass else None
        for stage, stage_plans in stages.items():
            self._stage_started(layer.index, stage)
            if stage in known:
                put_weights(layer, stage_plans, known[stage])
            else:
                statistics = self._measure(original, layer, stage, stage_plans) if measured is None else measured[stage]
                for solved in self._solve(original, layer, stage_plans, statistics):
                    if solved.solution is not None:
                        _put_weight(layer, solved.plan, solved.solution.weight)
                    yield replace(solved, num_tokens=statistics.moment.num_tokens)
            self.quantized.advance(layer, stage)
            if self.full_precision is not None:
                self.full_precision.advance(original, stage)
        if tweaking is not None and start is not None and self.full_precision is not None:
            self.norm_tweak = tweak_norms(layer, start, self.quantized, self.full_precision, tweaking)

    def replay(self, layer: DecoderLayer, original: DecoderLayer) -> None:
        """Take both streams through a layer that was finished before.

        Args:
            layer: as `run` left it: its linears quantized, its norms trained.
            original: as it was.
        """
        for stage in STAGE_NAMES:
            self.quantized.advance(layer, stage)
            if self.full_precision is not None:
                self.full_precision.advance(original, stage)

    @property
    def windows_per_batch(self) -> int:
        """Windows of the largest batch."""
        return max(batch.num_windows for batch in self.quantized.batches)

    def shrink_batches(self, windows_per_batch: int) -> None:
        """Split batches of more windows than that, between two decoder layers; results differ by rounding."""
        self.quantized = with_smaller_batches(self.quantized, windows_per_batch)
        if self.full_precision is not None:
            self.full_precision = with_smaller_batches(self.full_precision, windows_per_batch)

    def output_error(self) -> float | None:
        """Return the relative error of the hidden states, None without a full-precision stream."""
        return None if self.full_precision is None else output_error(self.quantized, self.full_precision)

    @property
    def measured_stream(self) -> ActivationStream:
        """The stream that moments are taken from."""
        if self.settings.measure_full_precision and self.full_precision is not None:
            return self.full_precision
        return self.quantized

    def _measure(
        self, original: DecoderLayer, layer: DecoderLayer, stage: StageName, plans: Sequence[LinearPlan]
    ) -> StageStatistics:
        reads = plans[0].info.name
        if self.settings.shift is not None and self.full_precision is not None:
            return measure_stage(
                (self.quantized, self.full_precision),
                (layer, original),
                stage,
                self._moment(plans, self.quantized),
                reads=reads,
                of_output=self.settings.shift.rule == "exact",
            )
        stream = self.measured_stream
        measured_layer = layer if stream is self.quantized else original
        moment = self._moment(plans, stream)
        stream.measure(measured_layer, stage, moment, reads=reads, keep=stage == "down")
        return StageStatistics(moment)

    def _measure_all(
        self, layer: DecoderLayer, stages: dict[StageName, list[LinearPlan]]
    ) -> dict[StageName, StageStatistics]:
        stream = self.measured_stream
        moments = {stage: self._moment(plans, stream) for stage, plans in stages.items()}
        reads = {stage: plans[0].info.name for stage, plans in stages.items()}
        stream.measure_whole_layer(layer, moments, reads=reads)
        return {stage: StageStatistics(moment) for stage, moment in moments.items()}

    def _moment(self, plans: Sequence[LinearPlan], stream: ActivationStream) -> InputMoment:
        return InputMoment(plans[0].info.in_features, dtype=self.settings.moment_dtype, device=stream.device)

    def _solve(
        self, original: DecoderLayer, layer: DecoderLayer, plans: Sequence[LinearPlan], statistics: StageStatistics
    ) -> Iterator[SolvedLinear]:
        yield from (SolvedLinear(plan, None) for plan in plans if plan.grid is None)
        quantized = [plan for plan in plans if plan.grid is not None]
        if not quantized:
            return
        mean_II = statistics.moment.take_mean()
        targets = self._targets(layer, quantized, mean_II, statistics)
        if self._sees_attention(plans):
            yield from self._solve_attention(original, layer, quantized, targets, (mean_II, statistics))
            return
        while quantized:
            alike = [plan for plan in quantized if _solved_alike(plan, quantized[0])]
            quantized = [plan for plan in quantized if plan not in alike]
            problems = [
                self._problem(plan, targets[plan.info.local_name].weight_OI, mean_II, statistics) for plan in alike
            ]
            solver = self._solver(alike[0], statistics)
            for plan, solution in zip(alike, solve_together(solver, problems), strict=True):
                noted = replace(solution, notes=(*solution.notes, *self._attention_unseen(plan)))
                yield _solved(plan, noted, targets[plan.info.local_name])

    def _attention_unseen(self, plan: LinearPlan) -> tuple[str, ...]:
        """Return why a query, key or value that should see attention does not."""
        if self.settings.attention is None or plan.info.stage != "qkv" or not METHODS[plan.method].sees_attention:
            return ()
        return ("solved without attention: a query, key or value of the layer is not quantized by the same method",)

    def _solver(self, plan: LinearPlan, statistics: StageStatistics) -> Solver:
        shift = self.settings.shift
        if statistics.drift is None or shift is None or shift.rule == "exact" or plan.method != "gptq":
            return METHODS[plan.method].solver
        assert shift.strength is not None
        return partial(gptaq.solve, cross_moment_II=statistics.drift.mean(), alpha=shift.strength)

    def _targets(
        self, layer: DecoderLayer, plans: Sequence[LinearPlan], mean_II: torch.Tensor, statistics: StageStatistics
    ) -> dict[str, Target]:
        dense = {plan.info.local_name: _dense_linear(layer, plan).weight_OI for plan in plans}
        shift = self.settings.shift
        if statistics.drift is None or shift is None or shift.rule != "exact":
            return {name: Target(weight_OI) for name, weight_OI in dense.items()}
        return shifted_targets(dense, mean_II, statistics.drift, shift)

    def _problem(
        self, plan: LinearPlan, weight_OI: torch.Tensor, mean_II: torch.Tensor, statistics: StageStatistics
    ) -> LayerProblem:
        assert plan.grid is not None
        problem = LayerProblem(
            name=plan.info.name,
            weight_OI=weight_OI,
            input_moment_II=mean_II,
            num_tokens=statistics.moment.num_tokens,
            grid=plan.grid,
            settings=self.settings.solver,
        )
        return problem if plan.binary is None else replace(problem, binary=plan.binary)

    def _sees_attention(self, plans: Sequence[LinearPlan]) -> bool:
        """Say whether all linears of a stage are solved together for what attention makes of them."""
        attention = self.settings.attention
        return (
            plans[0].info.stage == "qkv"
            and attention is not None
            and METHODS[plans[0].method].sees_attention
            and all(plan.grid is not None and plan.method == plans[0].method for plan in plans)
        )

    def _solve_attention(
        self,
        original: DecoderLayer,
        layer: DecoderLayer,
        plans: Sequence[LinearPlan],
        targets: dict[str, Target],
        measured: tuple[torch.Tensor, StageStatistics],
    ) -> Iterator[SolvedLinear]:
        assert self.settings.attention is not None
        shift = self.settings.shift
        stage = AttentionStage(
            layer=layer.copy(),
            original=original,
            quantized=self.quantized,
            full_precision=None if shift is None else self.full_precision,
            settings=self.settings.attention,
            solver=METHODS[plans[0].method].solver,
            shift=shift or ShiftSettings(strength=0.0),
            moment_dtype=self.settings.moment_dtype,
        )
        problems = {
            plan.info.local_name: self._problem(plan, targets[plan.info.local_name].weight_OI, *measured)
            for plan in plans
        }
        solutions = {name: (solution, strengths) for name, solution, strengths in stage.solve(problems)}
        for plan in plans:
            name = plan.info.local_name
            solution, strengths = solutions[name]
            num_rows = len(strengths) * layer.spec.head_dim
            yield _solved(plan, solution, _with_value_strengths(targets[name], strengths, num_rows))


def _solved(plan: LinearPlan, solution: LayerSolution, target: Target) -> SolvedLinear:
    notes = tuple(dict.fromkeys((*target.notes, *solution.notes)))
    return SolvedLinear(plan, replace(solution, notes=notes), target.shift_strength)


def _with_value_strengths(target: Target, strengths: Sequence[float], num_rows: int) -> Target:
    """Return the target with the mean strength over its rows, of which `num_rows` were shifted by value heads."""
    if target.shift_strength is None or not strengths:
        return target
    share = num_rows / len(target.weight_OI)
    of_values = sum(strengths) / len(strengths)
    return replace(target, shift_strength=share * of_values + (1 - share) * target.shift_strength)


def _solved_alike(first: LinearPlan, second: LinearPlan) -> bool:
    return first.method == second.method and first.grid == second.grid


def put_weights(layer: DecoderLayer, plans: Sequence[LinearPlan], weights: Mapping[str, QuantizedWeight]) -> None:
    """Put quantized weights, by full name, in the place of those of `layer`; linears without one stay dense."""
    for plan in plans:
        if plan.info.name in weights:
            _put_weight(layer, plan, weights[plan.info.name])


def _put_weight(layer: DecoderLayer, plan: LinearPlan, weight: QuantizedWeight) -> None:
    dense = _dense_linear(layer, plan)
    dequantized_OI = weight.to(dense.weight_OI.device).dequantize(dense.weight_OI.dtype)
    layer.linears[plan.info.local_name] = Linear(dequantized_OI, dense.bias_O)


def _dense_linear(layer: DecoderLayer, plan: LinearPlan) -> Linear:
    linear = layer.linears[plan.info.local_name]
    if not isinstance(linear, Linear):
        raise TypeError(f"{plan.info.name} is not dense")
    return linear
