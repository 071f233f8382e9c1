"""What a job will do, as numbers: tokens, sizes and passes, known before anything is read but headers.

Shapes: `O` output rows, `I` input columns, `M` model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from optgptq.cache_request import CacheRequest, check_num_windows, request_cache
from optgptq.calibration.start import check_norm_tweaking, num_held_out
from optgptq.calibration.stream import TOKENS_PER_BATCH
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.tokenizer import CHANGING_KEYS, REBUILT_MODEL_TYPES, UNCHANGED_CLASSES
from optgptq.data.tokenizer_files import read_json
from optgptq.data.windows import resolve_window_size
from optgptq.formats import format_named
from optgptq.formats.base import CheckpointFormat
from optgptq.job_source import JobSource
from optgptq.layout import LinearLayout
from optgptq.models.spec import DecoderSpec, StageName
from optgptq.plan import LinearPlan, outer_layouts, plan_head, plan_linears
from optgptq.recipe.records import Recipe
from optgptq.runtime.device import compute_dtype, require_device
from optgptq.solvers import METHODS

FLOAT_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """One job.

    Attributes:
        source: the model, checked.
        recipe: what is asked of it.
        form, plans, head, layouts, cache_plan: what was decided, as the job decides it.
        dtype: of weights and activations while the model runs.
        scale_dtype: of stored scales.
        device: where it runs.
        num_windows, window_size, num_held_out: of the calibration text.
        reads_text: some phase reads the calibration text.
    """

    source: JobSource
    recipe: Recipe
    form: CheckpointFormat
    plans: tuple[LinearPlan, ...]
    head: LinearPlan | None
    layouts: tuple[LinearLayout, ...]
    cache_plan: CacheRequest | None
    dtype: torch.dtype
    scale_dtype: torch.dtype
    device: torch.device
    num_windows: int
    window_size: int
    num_held_out: int
    reads_text: bool

    @property
    def spec(self) -> DecoderSpec:
        return self.source.spec

    @property
    def all_plans(self) -> tuple[LinearPlan, ...]:
        """The linears of all decoder layers, and the head where it is quantized."""
        return self.plans if self.head is None else (*self.plans, self.head)

    @property
    def keeps_weights(self) -> bool:
        """No weight is quantized."""
        return self.recipe.weights.method == "none"

    @property
    def num_tokens(self) -> int:
        """Tokens of all calibration windows."""
        return self.num_windows * self.window_size

    @property
    def batch_tokens(self) -> int:
        """Tokens of one forward pass."""
        asked = self.recipe.calibration.windows_per_batch
        windows = asked or max(TOKENS_PER_BATCH // self.window_size, 1)
        return min(windows, self.num_windows) * self.window_size

    @property
    def shifts(self) -> bool:
        """Targets are shifted, so that both streams are measured."""
        return self.recipe.weights.target_shift != "off"

    @property
    def reference_tokens(self) -> int:
        """Tokens that also run through the original layers."""
        calibration = self.recipe.calibration
        if self.shifts or self.recipe.norm_tweaking.steps or calibration.moment_stream == "full_precision":
            return self.num_tokens
        asked = calibration.full_precision_windows
        windows = max(self.num_windows // 32, 1) if asked is None else min(asked, self.num_windows)
        return windows * self.window_size

    @property
    def moment_dtype(self) -> torch.dtype:
        return FLOAT_DTYPES[self.recipe.calibration.moment_dtype]

    @property
    def solver_dtype(self) -> torch.dtype:
        return FLOAT_DTYPES[self.recipe.weights.solver_dtype]

    @property
    def converts_tokenizer(self) -> bool:
        """The tokenizer is not read as it is, but by transformers, whose import takes seconds."""
        folder = self.source.folder.path
        config = read_json(folder / "tokenizer_config.json")
        return (
            config.get("tokenizer_class") not in UNCHANGED_CLASSES
            or any(key in config for key in CHANGING_KEYS)
            or self.source.folder.config.get("model_type") in REBUILT_MODEL_TYPES
        )

    def weight_dtype(self, linear: str) -> torch.dtype:
        """Return the dtype in which the source stores a linear's weight."""
        return self.source.tensors.info(f"{linear}.weight").torch_dtype

    def stage_plans(self, layer_index: int) -> dict[StageName, list[LinearPlan]]:
        """Return the linears of one decoder layer by stage, in the order of the walk."""
        stages: dict[StageName, list[LinearPlan]] = {}
        for plan in self.plans:
            if plan.info.layer_index == layer_index and plan.info.stage != "head":
                stages.setdefault(plan.info.stage, []).append(plan)
        return stages

    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """Return the first decoder layer of every kind and how many there are: layers of a kind cost the same."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        by_layer: dict[int, list[object]] = {}
        for plan in self.plans:
            by_layer.setdefault(plan.info.layer_index, []).append(
                (plan.info.local_name, plan.method, plan.grid, plan.binary)
            )
        for index, linears in by_layer.items():
            kinds.setdefault(tuple(linears), []).append(index)
        return tuple((indices[0], len(indices)) for indices in kinds.values())


def sees_attention(plans: Sequence[LinearPlan]) -> bool:
    """Return whether the linears of a stage are solved together for what attention makes of them."""
    return (
        plans[0].info.stage == "qkv"
        and METHODS[plans[0].method].sees_attention
        and all(plan.grid is not None and plan.method == plans[0].method for plan in plans)
    )


def read_workload(model: Path, recipe: Recipe, *, device: str) -> Workload:
    """Return what a job would do; config and headers are read, and every check that needs no more is made.

    Raises:
        OptGPTQError: what the job itself would refuse before it reads a text or a weight.
    """
    source = JobSource.open(CheckpointFolder.open(model), recipe)
    form = format_named(recipe.export.format)
    keeps_weights = recipe.weights.method == "none"
    cache_plan = request_cache(source.spec, recipe.kv_cache, weights_stay=keeps_weights)
    calibration, kv_cache = recipe.calibration, recipe.kv_cache
    calibrates_cache = cache_plan is not None and kv_cache.calibrated
    if calibrates_cache:
        check_num_windows(calibration.num_windows, kv_cache.num_windows)
    check_norm_tweaking(source.spec, recipe)
    plans = plan_linears(source.spec, recipe, form)
    head = plan_head(source.spec, recipe, form)
    torch_device = require_device(device)
    weight_dtype = source.tensors.info(f"{plans[0].info.name}.weight").torch_dtype
    measures_linears = not keeps_weights or source.grouping is not None
    num_windows = calibration.num_windows if measures_linears else min(calibration.num_windows, kv_cache.num_windows)
    return Workload(
        source=source,
        recipe=recipe,
        form=form,
        plans=plans,
        head=head,
        layouts=(*(plan.layout for plan in plans), *outer_layouts(source.spec, head)),
        cache_plan=cache_plan,
        dtype=compute_dtype(weight_dtype, torch_device, wanted=calibration.compute_dtype),
        scale_dtype=form.scale_dtype(weight_dtype),
        device=torch_device,
        num_windows=num_windows,
        window_size=resolve_window_size(calibration.window_size, source.original_spec.max_position),
        num_held_out=num_held_out(recipe, num_windows),
        reads_text=measures_linears or calibrates_cache,
    )
