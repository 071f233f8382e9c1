"""Transformed models for tests: every family in float64, logits without the last rounding, dense folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from support.checkpoints import write_tensors
from support.tiny_models import TinyModel, reference_model, save_reference
from torch.nn import functional as F  # noqa: N812

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.source import TensorSource
from optgptq.checkpoint.writer import ShardWriter, TensorEntry
from optgptq.models.checks import check_inventory
from optgptq.models.decoder import Decoder
from optgptq.models.registry import model_spec
from optgptq.transforms.settings import TransformSettings
from optgptq.transforms.source import TransformedSource, transformed_source

FOLD = TransformSettings(fold_norms=True)
RESIDUAL = TransformSettings(residual_rotation="hadamard", seed=3)
VALUES = TransformSettings(value_rotation="hadamard", seed=4)
EVERYTHING = TransformSettings(residual_rotation="hadamard", value_rotation="hadamard", seed=5)
RANDOM = TransformSettings(fold_norms=True, residual_rotation="random", value_rotation="random", seed=6)
SETTINGS = {"fold": FOLD, "residual": RESIDUAL, "values": VALUES, "everything": EVERYTHING, "random": RANDOM}
_FOUR_NORMS = {"gemma2-softcaps", "gemma2-no_caps", "gemma3text-local_global", "gemma3text-final_cap"}
_UNFOLDABLE = {"opt-post_norm_projected", "bloom-residual_after_norm"}
_UNROTATABLE = _UNFOLDABLE | _FOUR_NORMS | {"bloom-alibi", "bloom-six_heads"}
_CLIPPED = {"mpt-six_heads_clipped"}
# Names of tiny models that a set of settings refuses.
REFUSED = {
    "fold": _UNFOLDABLE,
    "residual": _UNROTATABLE,
    "values": _CLIPPED,
    "everything": _UNROTATABLE | _CLIPPED,
    "random": _UNROTATABLE | _CLIPPED,
}


def saved(tiny: TinyModel, folder: Path, *, dtype: torch.dtype = torch.float64) -> CheckpointFolder:
    """Write a tiny model with random weights and open it."""
    return CheckpointFolder.open(save_reference(reference_model(tiny).to(dtype), folder))


def transformed(folder: CheckpointFolder, settings: TransformSettings) -> TransformedSource:
    """Return the view of `folder`, its config, spec and inventory checked against each other."""
    view, spec = transformed_source(folder, model_spec(folder), settings)
    assert isinstance(view, TransformedSource)
    assert model_spec(view) == spec
    check_inventory(view, spec)
    return view


def rewritten(folder: CheckpointFolder, tensors: dict[str, torch.Tensor], target: Path) -> CheckpointFolder:
    """Write a folder with the config of another and `tensors`."""
    return write_tensors(target, dict(sorted(tensors.items())), folder.config)


def exact_logits(decoder: Decoder, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits in the decoder's dtype, before scale and cap: `Head.logits` rounds them to float32."""
    head = decoder.head
    hidden = decoder.hidden(tokens_BS)
    hidden = hidden if head.norm is None else head.norm(hidden)
    if head.project_out_EM is not None:
        hidden = F.linear(hidden, head.project_out_EM)
    return head.project(hidden)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def write_dense(source: TensorSource, folder: Path) -> CheckpointFolder:
    """Write every tensor of `source` and its config as an ordinary model folder."""
    folder.mkdir()
    entries = [TensorEntry(name, info.torch_dtype, info.shape) for name, info in source.tensors.items()]
    writer = ShardWriter(folder, entries, max_shard_bytes=10**9)
    for name in source.tensors:
        writer.write_chunks(name, source.read_chunks(name))
    writer.finish()
    (folder / "config.json").write_text(json.dumps(source.config))
    return CheckpointFolder.open(folder)
