"""Tiny models whose key/value heads can be merged without loss, and the conversion of whole folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import write_tensors
from support.tiny_models import random_tokens

from optgptq.calibration.head_rows import Projection, head_rows
from optgptq.calibration.states import ActivationPlace, ActivationStore, MemoryStore
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.windows import Windows, windows_from_tokens
from optgptq.gqa.convert import GroupedModel, Texts, group_heads
from optgptq.gqa.keys import key_rule
from optgptq.gqa.plan import plan_grouping
from optgptq.journal.store import Journal, Steps
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.recipe.records import Recipe


def gqa_recipe(**values: Any) -> Recipe:
    """Return a recipe with float64 moments and this section `gqa`."""
    return Recipe.model_validate({"gqa": values, "calibration": {"moment_dtype": "float64", "held_out_windows": 2}})


def some_windows(num_windows: int = 12, window_size: int = 24, *, seed: int = 5) -> Windows:
    """Return windows of random tokens for the tiny models."""
    return windows_from_tokens(random_tokens(num_windows, window_size, seed=seed))


def grouped(
    folder: CheckpointFolder,
    recipe: Recipe,
    target: Path,
    *,
    windows: Windows | None = None,
    dtype: torch.dtype = torch.float64,
) -> GroupedModel:
    """Convert a model; its new tensors are in `target`."""
    target.mkdir()
    journal = Journal(target, None)
    journal.begin({})
    return grouped_into(folder, recipe, journal, windows=windows, dtype=dtype)


def grouped_into(
    folder: CheckpointFolder,
    recipe: Recipe,
    steps: Steps,
    *,
    windows: Windows | None = None,
    evaluation: Windows | None = None,
    dtype: torch.dtype = torch.float64,
    store: ActivationStore | None = None,
) -> GroupedModel:
    """Convert a model, or go on where `steps` end."""
    plan = plan_grouping(folder, model_spec(folder), recipe)
    assert plan is not None
    return group_heads(
        folder,
        plan,
        recipe,
        Texts(calibration=some_windows() if windows is None else windows, evaluation=evaluation),
        steps=steps,
        place=ActivationPlace(dtype=dtype, device=torch.device("cpu"), store=store or MemoryStore()),
        layer_started=lambda index: None,
    )


def with_common_subspaces(
    folder: CheckpointFolder, groups: Sequence[Sequence[int]], target: Path, *, seed: int = 2
) -> CheckpointFolder:
    """Write the model with the heads of each group made of its first head by maps that attention allows.

    Biases that drop out (of keys without rotation, of values where the output has a bias) stay what they were.
    """
    spec, generator = model_spec(folder), torch.Generator().manual_seed(seed)
    tensors = {name: folder.read(name) for name in folder.tensors}
    rows = head_rows(spec)
    for index in range(spec.num_layers):
        rule = key_rule(spec, index)
        prefix = spec.names.layer_prefix(index)
        for members in groups:
            for head in members[1:]:
                map_DD = commuting_map(spec, rule.rotary_dim, generator)
                _copy(tensors, prefix, rows.key, (members[0], head), map_DD, with_bias=not rule.drops_mean)
                map_DD = torch.randn(spec.head_dim, spec.head_dim, generator=generator, dtype=torch.float64)
                _copy(tensors, prefix, rows.value, (members[0], head), map_DD, with_bias="o" not in spec.biased_stages)
    return write_tensors(target, tensors, folder.config)


def commuting_map(spec: DecoderSpec, rotary_dim: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random matrix `[D, D]` that commutes with the rotation of the first `rotary_dim` features."""
    size, half = spec.head_dim, rotary_dim // 2
    map_DD = torch.zeros(size, size, dtype=torch.float64)
    real, imaginary = torch.randn(2, half, generator=generator, dtype=torch.float64)
    plane = torch.arange(half)
    map_DD[plane, plane], map_DD[plane, plane + half] = real, -imaginary
    map_DD[plane + half, plane], map_DD[plane + half, plane + half] = imaginary, real
    still = size - rotary_dim
    map_DD[rotary_dim:, rotary_dim:] = torch.randn(still, still, generator=generator, dtype=torch.float64)
    return map_DD


def _copy(
    tensors: dict[str, torch.Tensor],
    prefix: str,
    projection: Projection,
    heads: tuple[int, int],
    map_DD: torch.Tensor,
    *,
    with_bias: bool,
) -> None:
    first, second = (projection.rows_ND[head] for head in heads)
    weight_OI = tensors[f"{prefix}.{projection.linear}.weight"]
    weight_OI[second] = (map_DD @ weight_OI[first].double()).to(weight_OI.dtype)
    bias_O = tensors.get(f"{prefix}.{projection.linear}.bias")
    if bias_O is not None and with_bias:
        bias_O[second] = (map_DD @ bias_O[first].double()).to(bias_O.dtype)
