"""The model that a job works on: what its folder holds, with heads grouped and transforms made where a recipe asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from optgptq.calibration.states import ActivationPlace
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.source import TensorSource
from optgptq.data.windows import Windows
from optgptq.formats.dense import require_dense
from optgptq.formats.kv_cache_keys import CACHE_KEY
from optgptq.gqa.convert import GroupedModel
from optgptq.gqa.job import group_into, grouping_warnings
from optgptq.gqa.plan import GroupingPlan, plan_grouping
from optgptq.gqa.source import grouped_source
from optgptq.journal.store import Steps
from optgptq.models.checks import check_inventory
from optgptq.models.registry import family_of, model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.recipe.records import Recipe
from optgptq.reports.events import ProgressListener
from optgptq.transforms.checks import transform_warnings
from optgptq.transforms.kv_scales import KVScales, check_kv_scales
from optgptq.transforms.settings import TransformSettings
from optgptq.transforms.source import transformed_source


@dataclass(slots=True, kw_only=True, eq=False)
class JobSource:
    """The tensors of the job, and where they come from.

    Attributes:
        folder, original_spec: the model as it was given.
        recipe: what is asked of it.
        grouping: heads that become one; None where none do.
        tensors, spec: the model as it is quantized; before `group_heads` its shapes alone are right.
        grouped: what came of the grouping, once it is done.
    """

    folder: CheckpointFolder
    original_spec: DecoderSpec
    recipe: Recipe
    grouping: GroupingPlan | None
    tensors: TensorSource
    spec: DecoderSpec
    grouped: GroupedModel | None = None

    @classmethod
    def open(cls, folder: CheckpointFolder, recipe: Recipe) -> Self:
        """Return the source of a job; nothing is computed yet.

        Raises:
            ModelError: quantized already, damaged, not implemented, or nothing that the recipe's transforms leave as
                it is.
            RecipeError: a grouping that the model cannot have.
        """
        require_dense(folder)
        original = model_spec(folder)
        check_inventory(folder, original)
        grouping = plan_grouping(folder, original, recipe)
        shapes = folder if grouping is None else grouped_source(folder, grouping)
        grouped_spec = original if grouping is None else grouping.new_spec
        tensors, spec = transformed_source(
            shapes, grouped_spec, _transform_settings(recipe), own_head=recipe.head.is_quantized
        )
        if recipe.kv_cache.is_quantized and recipe.kv_cache.fold:
            ones_KD = torch.ones(spec.num_kv_heads, spec.head_dim, dtype=torch.float64)
            ones = KVScales(key_KD=ones_KD, value_KD=ones_KD)
            check_kv_scales(spec, [ones] * spec.num_layers, family=family_of(folder.config).name)
        return cls(
            folder=folder,
            original_spec=original,
            recipe=recipe,
            grouping=grouping,
            tensors=tensors,
            spec=spec,
        )

    def warnings(self) -> tuple[str, ...]:
        """Return what a user must hear about the source, the grouping and the transforms."""
        told = () if self.grouping is None else grouping_warnings(self.grouping, self.recipe)
        return (
            *told,
            *source_cache_warnings(self.folder),
            *transform_warnings(self.original_spec, _transform_settings(self.recipe)),
            *self._head_warnings(),
        )

    def _head_warnings(self) -> tuple[str, ...]:
        if not (self.recipe.head.is_quantized and self.original_spec.tied_head):
            return ()
        return (
            "head.bits makes a head of its own out of the embedding, which stays dense, and config.json says "
            "tie_word_embeddings false. An engine that ties them all the same computes with the dense one, or not at "
            "all.",
        )

    def group_heads(
        self, windows: Windows, steps: Steps, *, place: ActivationPlace, progress: ProgressListener
    ) -> None:
        """Merge heads where the recipe asks for it, their new tensors kept in `steps`; same errors as `group_into`."""
        if self.grouping is None:
            return
        self.grouped = group_into(
            self.folder,
            self.grouping,
            self.recipe,
            windows,
            steps=steps,
            place=place,
            progress=progress,
        )
        self._transform()

    def fold(self, scales: Sequence[KVScales]) -> None:
        """Move channel scales of keys and values into the weights; ModelError where that would change the model."""
        self._transform(scales)

    def _transform(self, scales: Sequence[KVScales] = ()) -> None:
        source: TensorSource = self.folder if self.grouped is None else self.grouped.source
        spec = self.original_spec if self.grouping is None else self.grouping.new_spec
        self.tensors, self.spec = transformed_source(
            source,
            spec,
            _transform_settings(self.recipe),
            kv_scales=scales,
            own_head=self.recipe.head.is_quantized,
        )


def source_cache_warnings(folder: CheckpointFolder) -> tuple[str, ...]:
    """Return a warning where the source has a quantized KV cache, which no job takes over."""
    if CACHE_KEY not in folder.config:
        return ()
    return ("the quantized KV cache of the source is left out: its parameters belong to the weights it came with",)


def _transform_settings(recipe: Recipe) -> TransformSettings:
    transform = recipe.transform
    return TransformSettings(
        fold_norms=transform.fold_norms,
        residual_rotation=transform.residual_rotation,
        value_rotation=transform.value_rotation,
        seed=transform.seed,
    )
