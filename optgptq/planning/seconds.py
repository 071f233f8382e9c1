"""Time of a job by phase: the passes that it makes, at the rates of this machine.

Shapes: `O` output rows, `I` input columns, `M` model width, `N` query heads, `K` key/value heads, `D` head dimension,
`S` positions of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from optgptq.bundled import bundled_path
from optgptq.calibration.attended_moments import WindowHeads, attends_in_one_call
from optgptq.calibration.start import layer_settings
from optgptq.calibration.stream import KEPT_BYTES
from optgptq.plan import LinearPlan
from optgptq.planning.disk import DiskNeed
from optgptq.planning.machine import MachineFile, MachineRates
from optgptq.planning.solver_time import SolverCost, solver_cost
from optgptq.planning.workload import Workload, sees_attention
from optgptq.planning.writing_time import writing_seconds
from optgptq.recipe.sources import source_kind

# Bytes of text that a tokenizer takes in a second, what loading it takes, and what it takes where transformers does it.
_TEXT_RATE, _TOKENIZER_SECONDS, _TRANSFORMERS_SECONDS = 1.5e6, 0.15, 3.5
# Of the blocks on and above the diagonal of a moment.
_UPPER_SHARE = 0.56
# Numbers that are read and written for each weight that is put back, encoded, hashed, decoded and compared.
_WRITTEN_NUMBERS, _VERIFIED_NUMBERS = 12, 10
# Numbers of a batch that norms, rotations, activations and residuals touch, in widths of the model and of its
# feed-forward layer.
_WIDTH_NUMBERS, _FEED_FORWARD_NUMBERS = 14, 3
_STEPS_PER_CHECK = 25
# Of softmax rows: positions of a window, and products of a head's matrices.
_ROW_POSITIONS, _ROW_PRODUCTS = 8, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """What one decoder layer takes: forward passes, moments, and solves."""

    passes: float
    measuring: float
    solving: float
    writing: float

    @property
    def total(self) -> float:
        return self.passes + self.measuring + self.solving + self.writing


class TimeModel:
    """Seconds of the phases of one job.

    Args:
        work: the job.
        rates: of the machine.
        kept: measurements of solvers; more are made where they are not known.
        disk: bytes of the job.
        disk_bytes_per_second: of writing.
    """

    def __init__(
        self, work: Workload, rates: MachineRates, kept: MachineFile, *, disk: DiskNeed, disk_bytes_per_second: float
    ) -> None:
        self.work = work
        self.rates = rates
        self.disk = disk
        self.disk_rate = disk_bytes_per_second
        self._kept = kept
        self._costs: dict[tuple[object, ...], SolverCost] = {}

    def hashing(self) -> float:
        """Return what it takes to hash the source."""
        stored = sum(info.num_bytes for info in self.work.source.folder.tensors.values())
        return stored / self.rates.hashed_bytes

    def text(self) -> float:
        """Return what reading the text takes, or writing it."""
        calibration = self.work.recipe.calibration
        if calibration.source != "self":
            loading = _TRANSFORMERS_SECONDS if self.work.converts_tokenizer else _TOKENIZER_SECONDS
            return loading + self._text_bytes() / _TEXT_RATE
        work = self.work
        return writing_seconds(work.spec, self.rates, num_windows=work.num_windows, window_size=work.window_size)

    def layer(self, index: int) -> LayerSeconds:
        """Return what one decoder layer takes."""
        stages = self.work.stage_plans(index)
        weights = sum(plan.info.out_features * plan.info.in_features for plans in stages.values() for plan in plans)
        return LayerSeconds(
            passes=self.forward(self.work.num_tokens)
            + self.forward(self.work.reference_tokens)
            + self._again(stages["down"])
            + self._tweaking(),
            measuring=sum(self._measuring(plans) for plans in stages.values()),
            solving=sum(self._solving(plans) for plans in stages.values()),
            writing=weights * _WRITTEN_NUMBERS / self.rates.numbers,
        )

    def solving(self) -> float:
        """Return what the walk over all decoder layers takes."""
        return sum(self.layer(index).total * count for index, count in self.work.layer_kinds())

    def head(self) -> float:
        """Return what the output head takes: norms, a moment, the solve, and what is put into the journal."""
        work, rates, plan = self.work, self.rates, self.work.head
        assert plan is not None
        rows, columns = plan.info.out_features, plan.info.in_features
        measured = work.num_tokens - work.num_held_out * work.window_size
        return (
            6 * measured * columns / rates.numbers
            + measured * columns**2 / rates.moment_products
            + self._cost(plan, coupled=False).seconds(rows, columns)
            + rows * columns * _WRITTEN_NUMBERS / rates.numbers
        )

    def heads(self) -> float:
        """Return what merging heads or finding scales to fold takes: some passes over every decoder layer, roughly."""
        moments = self.work.num_tokens * self.work.spec.hidden_size**2 / self.rates.moment_products
        return self.work.spec.num_layers * (6 * self.forward(self.work.num_tokens) + 2 * moments)

    def assembly(self) -> float:
        """Return what copying and forcing everything to disk takes, and its hashes."""
        stored = self.disk.output_bytes
        return (
            stored / self.disk_rate + stored / self.rates.hashed_bytes + self.disk.dense_bytes / self.rates.hashed_bytes
        )

    def verifying(self) -> float:
        """Return what reading back and comparing takes."""
        weights = sum(plan.info.out_features * plan.info.in_features for plan in self.work.all_plans)
        return weights * (_VERIFIED_NUMBERS / self.rates.numbers + 1 / self.rates.hashed_bytes)

    def cache(self) -> float:
        """Return what finding the parameters of a KV cache takes, roughly: passes and searches in every layer."""
        tokens = min(self.work.recipe.kv_cache.num_windows, self.work.num_windows) * self.work.window_size
        if not self.work.recipe.kv_cache.calibrated:
            return 0.01 * self.work.spec.num_layers
        return self.work.spec.num_layers * (0.5 + 12 * self.forward(tokens))

    def forward(self, num_tokens: int) -> float:
        """Return what one pass of tokens through one decoder layer takes."""
        spec, rates = self.work.spec, self.rates
        linears = sum(
            plan.info.out_features * plan.info.in_features for plan in self.work.plans if plan.info.layer_index == 0
        )
        heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        numbers = _WIDTH_NUMBERS * spec.hidden_size + 4 * heads + _FEED_FORWARD_NUMBERS * spec.intermediate_size
        attention = self.work.window_size * spec.num_heads * spec.head_dim / rates.attention_products
        return num_tokens * (linears / rates.products + attention + numbers / rates.numbers)

    def _again(self, plans: Sequence[LinearPlan]) -> float:
        """Return what inputs of the widest stage cost that did not fit and are computed twice."""
        work, columns = self.work, plans[0].info.in_features
        tokens = work.num_tokens * (2 if work.shifts else 1)
        kept = KEPT_BYTES * (2 if work.shifts else 1) // (columns * work.dtype.itemsize)
        products = columns * work.spec.hidden_size * (2 if work.spec.gated else 1)
        if not work.recipe.weights.true_sequential:
            # One more pass that measures everything.
            return self.forward(work.num_tokens)
        return max(tokens - kept, 0) * products / self.rates.products

    def _tweaking(self) -> float:
        """Return what training the norms takes: forward and backward in float32, and checks on held-out windows."""
        work, steps = self.work, self.work.recipe.norm_tweaking.steps
        if not steps:
            return 0.0
        checks = (2 + steps // _STEPS_PER_CHECK) * work.num_held_out * work.window_size
        slower = 4 // work.dtype.itemsize
        return slower * (3 * steps * self.forward(work.batch_tokens) + self.forward(checks)) + self.forward(
            work.num_tokens
        )

    def _measuring(self, plans: Sequence[LinearPlan]) -> float:
        work, rates = self.work, self.rates
        columns = plans[0].info.in_features
        measured = work.num_tokens - work.num_held_out * work.window_size
        seconds = measured * columns**2 / rates.moment_products
        seconds += 5 * columns**2 / rates.numbers
        if work.shifts:
            of_output = plans[0].info.stage in ("o", "down") and work.recipe.weights.target_shift == "exact"
            rows = work.spec.hidden_size if of_output else columns
            full = rates.moment_products * _UPPER_SHARE
            seconds += measured * rows * columns / full
            if of_output:
                seconds += work.num_tokens * rows * columns / rates.products
            seconds += self._shifting(plans, columns)
        if sees_attention(plans):
            seconds += self._attention(measured)
        return seconds

    def _shifting(self, plans: Sequence[LinearPlan], columns: int) -> float:
        """Return what one factorization and the shifts of all linears of a stage take."""
        if self.work.recipe.weights.target_shift != "exact":
            return 0.0
        rows = sum(plan.info.out_features for plan in plans if plan.grid is not None)
        rates = self.rates
        held = self.work.num_held_out * self.work.window_size
        # Two triangular solves, a product with the drift, and two products for the strength.
        products = 3 * rows * columns**2 + 2 * held * rows * columns
        return (
            columns**3 / rates.factor_products + 10 * columns**2 / rates.numbers + 2 * products / rates.moment_products
        )

    def _attention(self, num_tokens: int) -> float:
        """Return what the moments of queries, keys and values behind attention take."""
        work, spec, rates = self.work, self.work.spec, self.rates
        asked = work.recipe.attention
        seconds = 0.0
        if asked.rows == "softmax":
            windows = min(asked.row_windows, work.num_windows)
            rows = windows * _ROW_POSITIONS * spec.num_heads * work.window_size
            seconds += rows * spec.head_dim * (spec.head_dim * _ROW_PRODUCTS / rates.products + 20 / rates.numbers)
        if asked.values:
            streams = 2 if work.shifts else 1
            rows = int(work.num_tokens * asked.value_share) * spec.num_heads
            attended = self._attended(rows * work.window_size)
            sums = rows * spec.hidden_size**2 / rates.moment_products * (1 if streams == 1 else 1 + 1 / _UPPER_SHARE)
            seconds += streams * attended + sums
            seconds += streams * spec.num_kv_heads * self._factor(spec.hidden_size)
        return seconds

    def _attended(self, num_weights: int) -> float:
        """Return what attention to the layer's inputs takes, for so many weights, half of them of later keys."""
        spec, rates = self.work.spec, self.rates
        shapes = ((spec.num_heads, 2, spec.head_dim), (spec.num_kv_heads, 2, spec.head_dim), (2, spec.hidden_size))
        windows = WindowHeads(
            *(torch.empty(1, *shape, dtype=self.work.dtype, device=self.work.device) for shape in shapes)
        )
        products = num_weights * (spec.hidden_size + spec.head_dim)
        if attends_in_one_call(windows, spec, 0):
            return products / 2 / rates.attention_products
        return products / rates.products + 6 * num_weights / rates.numbers

    def _factor(self, columns: int) -> float:
        return columns**3 / self.rates.factor_products + 10 * columns**2 / self.rates.numbers

    def _solving(self, plans: Sequence[LinearPlan]) -> float:
        quantized = [plan for plan in plans if plan.grid is not None]
        if not quantized:
            return 0.0
        spec, attention = self.work.spec, self.work.recipe.attention
        if sees_attention(plans):
            first, width = quantized[0], quantized[0].info.in_features
            coupled = self._cost(first, coupled=attention.rows != "off")
            seconds = sum(
                coupled.seconds(heads * spec.head_dim, width) for heads in (spec.num_heads, spec.num_kv_heads)
            )
            values = self._cost(first, coupled=attention.values and attention.value_rows)
            number = spec.num_kv_heads if attention.values else 1
            return seconds + number * values.seconds(spec.num_kv_heads * spec.head_dim // number, width)
        seconds = 0.0
        groups: dict[tuple[object, ...], list[LinearPlan]] = {}
        for plan in quantized:
            groups.setdefault((plan.method, plan.grid), []).append(plan)
        for alike in groups.values():
            rows = sum(plan.info.out_features for plan in alike)
            seconds += self._cost(alike[0], coupled=False).seconds(rows, alike[0].info.in_features)
        return seconds

    def _cost(self, plan: LinearPlan, *, coupled: bool) -> SolverCost:
        key = (plan.method, plan.grid, plan.binary, coupled)
        if key not in self._costs:
            settings = layer_settings(self.work.recipe, self.work.source.tensors).solver
            self._costs[key] = solver_cost(
                plan, settings, self.rates, self._kept, coupled=coupled, device=self.work.device
            )
        return self._costs[key]

    def _text_bytes(self) -> int:
        source = self.work.recipe.calibration.source
        kind = source_kind(source)
        if kind in ("bundled", "text"):
            return (bundled_path(source) if kind == "bundled" else Path(source)).stat().st_size
        return min(4 * self.work.num_tokens * 5 + 1_000_000, 100_000_000)
