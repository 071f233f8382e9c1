"""Memory of one decoder layer while it is measured and solved, stage by stage.

Shapes: `O` output rows, `I` input columns, `M` model width, `N` query heads, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from optgptq.calibration.attended_moments import attended_bytes
from optgptq.calibration.disk_states import Activations
from optgptq.calibration.softmax_rows import SoftmaxRowSettings, softmax_row_bytes
from optgptq.calibration.stream import KEPT_BYTES
from optgptq.models.spec import StageName
from optgptq.native.moment import multiplies_bfloat16
from optgptq.plan import LinearPlan
from optgptq.planning.solver_memory import factor_bytes, solver_bytes
from optgptq.planning.workload import Workload, sees_attention

# Moments of value heads that are collected at a time (`optgptq.calibration.attention_stage`).
_VALUE_BYTES = 1 << 29
# Tokens of a moment's chunk (`optgptq.calibration.moments`).
_CHUNK_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """What is in memory at the worst moment of a stage, in bytes.

    Attributes:
        streams: activations of all windows that memory holds.
        weights: the decoder layer, dense and as far as it is quantized.
        moments: of the stage, with what the target shift needs.
        work: what a forward pass, a factorization or a solver holds for a moment.
    """

    streams: int
    weights: int
    moments: int
    work: int

    @property
    def total(self) -> int:
        return self.streams + self.weights + self.moments + self.work


def layer_memory(work: Workload, layer_index: int, *, activations: Activations) -> dict[StageName, StageMemory]:
    """Return the memory of every stage of a decoder layer, beside what the process holds anyway."""
    stages = work.stage_plans(layer_index)
    numbers = {
        name: sum(plan.info.out_features * plan.info.in_features for plan in plans) for name, plans in stages.items()
    }
    dense = sum(numbers.values()) * work.dtype.itemsize
    if work.recipe.norm_tweaking.steps:
        # Its starts, and the layer in float32.
        dense += sum(numbers.values()) * 4
    found, solved = {}, 0
    for name, plans in stages.items():
        quantized = sum(
            plan.info.out_features * plan.info.in_features * (work.dtype.itemsize + 1)
            for plan in plans
            if plan.grid is not None
        )
        peak = max(_stage_peaks(work, name, plans), key=sum)
        found[name] = StageMemory(
            streams=_streams(work, name, activations=activations) + _kept(work, stages, name),
            weights=dense + solved + quantized,
            moments=peak[0],
            work=peak[1],
        )
        solved += quantized
    return found


def _streams(work: Workload, stage: StageName, *, activations: Activations) -> int:
    """Return the bytes of the states of both streams that are in memory between two batches."""
    spec = work.spec
    heads = spec.num_heads * spec.head_dim
    width = spec.hidden_size
    if stage == "o":
        width += heads
    elif stage != "qkv" and spec.residual != "sequential":
        width += spec.hidden_size
    tokens = [work.num_tokens, work.reference_tokens]
    if stage in ("gate_up", "down") and (work.recipe.norm_tweaking.steps or work.recipe.kv_cache.fp8_scales != "off"):
        # The states before the layer stay until it is finished.
        tokens.append(work.num_tokens * spec.hidden_size // width)
    if activations == "disk":
        tokens = [min(count, work.batch_tokens) for count in tokens]
    return sum(tokens) * width * work.dtype.itemsize


def _kept(work: Workload, stages: Mapping[StageName, Sequence[LinearPlan]], stage: StageName) -> int:
    """Return the inputs of the widest stage that wait for the next pass."""
    if stage != "down" or not work.recipe.weights.true_sequential:
        return 0
    columns = stages[stage][0].info.in_features
    of_batch = work.batch_tokens * columns * work.dtype.itemsize
    of_all = work.num_tokens * columns * work.dtype.itemsize
    room = KEPT_BYTES // of_batch * of_batch if of_batch else 0
    return min(of_all, room) * (2 if work.shifts else 1)


def _stage_peaks(work: Workload, stage: StageName, plans: Sequence[LinearPlan]) -> Iterator[tuple[int, int]]:
    """Yield moments and work at each moment that may be the worst of a stage."""
    columns = plans[0].info.in_features
    moment = columns**2 * work.moment_dtype.itemsize
    drift = _drift(work, stage, columns)
    yield moment + drift, _pass_bytes(work, stage, columns)
    quantized = [plan for plan in plans if plan.grid is not None]
    if not quantized:
        return
    # The sum, the upper triangle, what is mirrored, and the mean.
    yield moment + drift, 3 * moment
    rows = sum(plan.info.out_features for plan in quantized)
    targets = 0
    if work.shifts and work.recipe.weights.target_shift == "exact":
        numbers = rows * columns * work.moment_dtype.itemsize
        yield moment + drift, factor_bytes(columns, work.moment_dtype.itemsize) + 4 * numbers + drift
        targets = numbers
    held = moment + drift + targets
    if sees_attention(plans):
        yield from ((held, work_bytes) for work_bytes in _attention_bytes(work, quantized))
        return
    itemsize = work.solver_dtype.itemsize
    for alike in _stacked(quantized):
        stacked = sum(plan.info.out_features for plan in alike)
        copy = stacked * columns * itemsize if len(alike) > 1 else 0
        yield held, copy + solver_bytes(alike[0], stacked, itemsize=itemsize)


def _stacked(plans: Sequence[LinearPlan]) -> list[list[LinearPlan]]:
    """Return the linears that are solved as one."""
    groups: dict[tuple[object, ...], list[LinearPlan]] = {}
    for plan in plans:
        groups.setdefault((plan.method, plan.grid), []).append(plan)
    return list(groups.values())


def _drift(work: Workload, stage: StageName, columns: int) -> int:
    """Return the sum of the drift, and inputs and drift of the windows held out."""
    if not work.shifts:
        return 0
    of_output = stage in ("o", "down") and work.recipe.weights.target_shift == "exact"
    rows = work.spec.hidden_size if of_output else columns
    held = (
        work.num_held_out
        * work.window_size
        * (columns * work.dtype.itemsize + rows * (4 if of_output else work.dtype.itemsize))
    )
    return rows * columns * work.moment_dtype.itemsize + held


def _pass_bytes(work: Workload, stage: StageName, columns: int) -> int:
    """Return what a batch holds on its way through a stage, and a moment's chunk in another dtype."""
    spec, itemsize = work.spec, work.dtype.itemsize
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    widths: dict[StageName, int] = {
        "qkv": 2 * spec.hidden_size + 2 * heads + spec.num_heads * spec.head_dim,
        "o": 2 * spec.hidden_size,
        "gate_up": 2 * spec.hidden_size,
        "down": spec.hidden_size + spec.intermediate_size * (3 if spec.gated else 2),
    }
    numbers = work.batch_tokens * widths[stage] * itemsize
    if work.shifts:
        numbers += work.batch_tokens * (columns * itemsize + 3 * spec.hidden_size * 4)
    if work.recipe.norm_tweaking.steps and stage == "down":
        # The layer in float32, with what its gradient needs.
        numbers += work.batch_tokens * 4 * (8 * spec.hidden_size + 3 * heads + 5 * spec.intermediate_size)
    native = work.dtype == torch.bfloat16 and work.moment_dtype == torch.float32 and work.device.type == "cpu"
    if work.dtype == work.moment_dtype or (native and multiplies_bfloat16(torch.zeros(1))):
        return numbers
    return numbers + min(work.batch_tokens, _CHUNK_TOKENS) * columns * work.moment_dtype.itemsize


def _attention_bytes(work: Workload, plans: Sequence[LinearPlan]) -> Iterator[int]:
    """Yield what measuring and solving queries, keys and values for what attention makes of them holds."""
    spec, attention = work.spec, work.recipe.attention
    width, number = spec.hidden_size, work.moment_dtype.itemsize
    inputs = work.batch_tokens * work.dtype.itemsize
    inputs *= width + 2 * (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    if attention.rows == "softmax":
        settings = SoftmaxRowSettings(dtype=work.moment_dtype)
        yield inputs + softmax_row_bytes(spec, settings, num_positions=work.window_size)
    for heads in {spec.num_heads, spec.num_kv_heads}:
        yield solver_bytes(
            plans[0], heads * spec.head_dim, itemsize=work.solver_dtype.itemsize, coupled=attention.rows != "off"
        )
    if not attention.values:
        yield solver_bytes(plans[0], spec.num_kv_heads * spec.head_dim, itemsize=work.solver_dtype.itemsize)
        return
    choosing = work.shifts and work.recipe.weights.shift_strength == "held_out"
    per_pass = max(_VALUE_BYTES // (width**2 * number * (4 if choosing else 2)), 1)
    heads = min(spec.num_kv_heads, per_pass)
    one_sum = heads * width**2 * number
    sums = one_sum * (4 if choosing else 2 if work.shifts else 1)
    scratch = attended_bytes(spec, work.window_size, num_kv_heads=0, dtype=work.moment_dtype, shift=work.shifts)
    yield sums + scratch + inputs * (2 if work.shifts else 1)
    means = 4 if choosing else 2 if work.shifts else 1
    yield sums + (means + 2) * width**2 * number + factor_bytes(width, number)
