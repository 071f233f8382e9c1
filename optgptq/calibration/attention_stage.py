"""The stage `qkv` solved for what attention makes of it: queries and keys two-sided, values head by head.

Queries and keys come first. Values are measured behind them, through the attention map that the quantized queries and
keys make, in both streams: an error of a value head is paid, and the drift of its stream is corrected, after attention.

Shapes: `O` output rows, `I` input columns, `N` query heads, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from optgptq.calibration.attention_inputs import attention_inputs
from optgptq.calibration.attention_map import check_attention
from optgptq.calibration.attention_moments import AttentionMoments, AttentionMomentSettings
from optgptq.calibration.head_rows import HeadRows, Projection, head_rows
from optgptq.calibration.row_factors import two_sided_reason, value_output_moments
from optgptq.calibration.softmax_rows import SoftmaxRowMoments, SoftmaxRowSettings
from optgptq.calibration.stream import ActivationStream, Batch
from optgptq.calibration.targets import ShiftSettings, Target, shifted_by_moments
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear
from optgptq.solvers import LayerProblem, LayerSolution, Solver
from optgptq.solvers.stacking import put_together

RowFactors = Literal["off", "pooled", "softmax"]

# Moments of value heads that are collected at a time.
_VALUE_BYTES = 1 << 29


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSettings:
    """What of attention the solver sees.

    Attributes:
        rows: output moments of queries and keys: none, pooled over all pairs of tokens, or behind the softmax.
        row_windows: windows they are measured on.
        values: value heads have input moments of their own, behind the attention map.
        value_rows: value heads have output moments, those of the output projection.
        value_share: share of the positions that count in the moments of values.
        seed: of the positions that are drawn.
    """

    rows: RowFactors = "off"
    row_windows: int = 32
    values: bool = False
    value_rows: bool = False
    value_share: float = 0.25
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AttentionStage:
    """One decoder layer before its attention.

    Attributes:
        layer: the layer whose queries, keys and values are dense, in the quantized stream.
        original: the same in the full-precision stream.
        quantized, full_precision: the streams; without the second there is no shift.
        settings: what is asked.
        solver: solves one problem.
        shift: how values are shifted; ignored without a full-precision stream.
        moment_dtype: accumulator of all moments.
    """

    layer: DecoderLayer
    original: DecoderLayer
    quantized: ActivationStream
    full_precision: ActivationStream | None
    settings: AttentionSettings
    solver: Solver
    shift: ShiftSettings
    moment_dtype: torch.dtype

    def solve(self, problems: Mapping[str, LayerProblem]) -> Iterator[tuple[str, LayerSolution, tuple[float, ...]]]:
        """Yield local name and solution of every linear of the stage, and how far its value heads were shifted.

        The last is empty where a linear holds no value heads, or they were not shifted on their own.

        Args:
            problems: by local name, how each linear would be solved without attention, its weight the target.

        Raises:
            NumericalError: a moment is not finite, or attention is not a causal softmax.
        """
        self._check()
        rows = head_rows(self.layer.spec)
        parts: dict[str, list[tuple[torch.Tensor, LayerSolution]]] = {name: [] for name in problems}
        query_NDD, key_KDD, notes = self._row_moments()
        for projection, moment_NDD in ((rows.query, query_NDD), (rows.key, key_KDD)):
            part = replace(_part(problems, projection), output_moment_NDD=moment_NDD)
            solution = self.solver(part)
            solution = replace(solution, notes=(*solution.notes, *notes))
            parts[projection.linear].append((projection.rows_ND.flatten(), solution))
        strengths: tuple[float, ...] = ()
        if self.settings.values:
            values, strengths = self._solve_values(problems[rows.value.linear], rows, parts)
        else:
            values = [(rows.value.rows_ND.flatten(), self.solver(_part(problems, rows.value)))]
        parts[rows.value.linear] += values
        for name, linear_parts in parts.items():
            yield name, put_together(linear_parts), strengths if name == rows.value.linear else ()

    def _check(self) -> None:
        batch = self.quantized.batches[0]
        length = None if batch.valid_BS is None else int(batch.valid_BS[0].sum())
        inputs_BSM = self.layer.stage_input("qkv", batch.state, self.quantized.context)[:1]
        if length is None or length == inputs_BSM.shape[1]:
            check_attention(self.layer, inputs_BSM, self.quantized.context)

    def _row_moments(self) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[str, ...]]:
        """Return the output moments of queries and keys, None where they are not used, and why not."""
        if self.settings.rows == "off":
            return None, None, ()
        spec, index = self.layer.spec, self.layer.index
        num_positions = self.quantized.window_size
        if self.settings.rows == "pooled":
            reason = two_sided_reason(spec, index, num_positions)
            if reason is not None:
                return None, None, (f"solved one-sided: {reason}",)
        moments = self._row_collector(num_positions)
        for batch in self._measured(self.settings.row_windows):
            inputs_BSM = self.layer.stage_input("qkv", batch.state, self.quantized.context)
            heads = attention_inputs(self.layer, inputs_BSM, self.quantized.context)
            moments.add(heads, batch.valid_BS, first_window=batch.first_window)
        return moments.query_output_moments(), moments.key_output_moments(), ()

    def _row_collector(self, num_positions: int) -> AttentionMoments | SoftmaxRowMoments:
        (output_name,) = self.layer.spec.stage("o").linears
        device = self.quantized.device
        if self.settings.rows == "pooled":
            pooled = AttentionMomentSettings(dtype=self.moment_dtype, seed=self.settings.seed)
            return AttentionMoments(self.layer, pooled, num_positions=num_positions, device=device)
        return SoftmaxRowMoments(
            self.layer,
            SoftmaxRowSettings(seed=self.settings.seed, dtype=self.moment_dtype),
            output_weight_OI=_weight(self.layer, output_name),
            num_positions=num_positions,
        )

    def _measured(self, num_windows: int) -> list[Batch]:
        batches = [batch for batch in self.quantized.batches if not batch.held_out]
        return [batch for batch in batches if batch.first_window < num_windows]

    def _solve_values(
        self,
        problem: LayerProblem,
        rows: HeadRows,
        parts: dict[str, list[tuple[torch.Tensor, LayerSolution]]],
    ) -> tuple[list[tuple[torch.Tensor, LayerSolution]], tuple[float, ...]]:
        layer = self._with_queries_and_keys(parts)
        dense_OI = _weight(self.layer, rows.value.linear)
        (output_name,) = self.layer.spec.stage("o").linears
        output_KDD = value_output_moments(_weight(self.layer, output_name), self.layer.spec)
        held_out = self.full_precision is not None and self.shift.strength is None
        per_pass = max(
            _VALUE_BYTES // (dense_OI.shape[1] ** 2 * self.moment_dtype.itemsize * (4 if held_out else 2)), 1
        )
        solved, strengths = [], []
        for first in range(0, self.layer.spec.num_kv_heads, per_pass):
            heads = range(first, min(first + per_pass, self.layer.spec.num_kv_heads))
            measured = self._value_moments(layer, heads, held_out=False)
            chosen = self._value_moments(layer, heads, held_out=True) if held_out else None
            for head in heads:
                rows_D = rows.value.rows_ND[head]
                name = f"{problem.name}: value head {head}"
                target = self._value_target(dense_OI[rows_D], measured, chosen, head, name)
                part = replace(
                    problem,
                    name=name,
                    weight_OI=target.weight_OI,
                    input_moment_II=measured.value_input_moment(head),
                    output_moment_NDD=output_KDD[head : head + 1] if self.settings.value_rows else None,
                )
                solved.append((rows_D, self.solver(part)))
                strengths += [] if target.shift_strength is None else [target.shift_strength]
        return solved, tuple(strengths)

    def _value_target(
        self,
        dense_DI: torch.Tensor,
        measured: AttentionMoments,
        chosen: AttentionMoments | None,
        head: int,
        name: str,
    ) -> Target:
        if self.full_precision is None:
            return Target(dense_DI)
        held_out = (chosen.value_input_moment(head), chosen.value_shift_moment(head)) if chosen is not None else None
        return shifted_by_moments(
            dense_DI,
            measured.value_input_moment(head),
            measured.value_shift_moment(head),
            self.shift,
            held_out=held_out,
            name=name,
        )

    def _value_moments(self, layer: DecoderLayer, heads: range, *, held_out: bool) -> AttentionMoments:
        settings = AttentionMomentSettings(
            dtype=self.moment_dtype,
            rows=False,
            value_heads=heads,
            value_shift=self.full_precision is not None,
            value_share=self.settings.value_share,
            seed=self.settings.seed,
        )
        context = self.quantized.context
        stream = self.quantized
        moments = AttentionMoments(layer, settings, num_positions=stream.window_size, device=stream.device)
        others = (
            self.full_precision.batches if self.full_precision is not None else [None] * len(self.quantized.batches)
        )
        for batch, other in zip(self.quantized.batches, others, strict=True):
            if batch.held_out != held_out:
                continue
            inputs_BSM = layer.stage_input("qkv", batch.state, context)
            reference = None
            if other is not None:
                reference_BSM = self.original.stage_input("qkv", other.state, context)
                reference = attention_inputs(self.original, reference_BSM, context)
            moments.add(
                attention_inputs(layer, inputs_BSM, context),
                batch.valid_BS,
                first_window=batch.first_window,
                reference=reference,
            )
        return moments

    def _with_queries_and_keys(self, parts: dict[str, list[tuple[torch.Tensor, LayerSolution]]]) -> DecoderLayer:
        """Return the layer with the queries and keys that were solved; values are dense."""
        layer = self.layer.copy()
        for name, solved in parts.items():
            dense = _linear(layer, name)
            weight_OI = dense.weight_OI.clone()
            for rows_O, solution in solved:
                weight_OI[rows_O] = solution.weight.dequantize(weight_OI.dtype)
            layer.linears[name] = Linear(weight_OI, dense.bias_O)
        return layer


def _part(problems: Mapping[str, LayerProblem], projection: Projection) -> LayerProblem:
    problem = problems[projection.linear]
    return replace(problem, weight_OI=problem.weight_OI[projection.rows_ND.flatten()])


def _linear(layer: DecoderLayer, name: str) -> Linear:
    linear = layer.linears[name]
    if not isinstance(linear, Linear):
        raise TypeError(f"{name} is not dense")
    return linear


def _weight(layer: DecoderLayer, name: str) -> torch.Tensor:
    return _linear(layer, name).weight_OI
