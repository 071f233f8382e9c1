"""Small quantized checkpoints for tests: round-to-nearest weights, written through the package's own parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.publish import staging_folder
from optgptq.checkpoint.source import TensorSource
from optgptq.checkpoint.writer import ShardWriter, TensorEntry
from optgptq.formats import format_named
from optgptq.formats.checkpoint import copy_dense, plan_entries, write_side_files
from optgptq.layout import LinearLayout

REPOSITORY = Path(__file__).resolve().parents[2]
STORY_LLAMA = REPOSITORY / "configs" / "bundled" / "story-llama"
ATTENTION = ("q_proj", "k_proj", "v_proj")
FEED_FORWARD = ("gate_proj", "up_proj")


def exact_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round to bfloat16, clear of float16's subnormal numbers: exact in both."""
    return scale.clamp(min=1e-4).to(torch.bfloat16).to(torch.float32)


def round_to_nearest(weight_OI: torch.Tensor, layout: LinearLayout, *, scale_dtype: torch.dtype) -> AffineWeight:
    """The plainest quantized weight of `layout`; zero points are at least 1, so that version 1 of GPTQ holds them."""
    bits = layout.bits
    assert bits is not None
    rows, columns = weight_OI.shape
    group_size = columns if layout.group_size == -1 else layout.group_size
    grouped_OGJ = weight_OI.to(torch.float32).reshape(rows, columns // group_size, group_size)
    middle = 2 ** (bits - 1)
    if layout.symmetric:
        scale_OG = exact_scale(2 * grouped_OGJ.abs().amax(-1) / (2**bits - 1))
        zero_OG = torch.full_like(scale_OG, middle).to(torch.int32)
    else:
        low_OG, high_OG = grouped_OGJ.amin(-1).clamp(max=0), grouped_OGJ.amax(-1).clamp(min=0)
        scale_OG = exact_scale((high_OG - low_OG) / (2**bits - 1))
        zero_OG = (-low_OG / scale_OG).round().clamp(1, 2**bits - 1).to(torch.int32)
    codes_OGJ = ((grouped_OGJ / scale_OG[..., None]).round() + zero_OG[..., None]).clamp(0, 2**bits - 1)
    return AffineWeight(
        codes_OI=codes_OGJ.reshape(rows, columns).to(torch.uint8),
        scale_OG=scale_OG.to(scale_dtype),
        zero_point_OG=zero_OG,
        bits=bits,
        group_size=group_size,
        symmetric=layout.symmetric,
    )


def story_layouts(*, bits: int = 4, group_size: int = 64, symmetric: bool = True) -> list[LinearLayout]:
    """Layouts of all 42 linears of the bundled model, all alike, fused names given."""
    source = CheckpointFolder.open(STORY_LLAMA)
    layouts = []
    for name, info in source.tensors.items():
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        if not leaf.endswith("_proj"):
            continue
        group = next((group for group in (ATTENTION, FEED_FORWARD) if leaf in group), (leaf,))
        fused = {ATTENTION: "qkv_proj", FEED_FORWARD: "gate_up_proj"}.get(group, leaf)
        layouts.append(
            LinearLayout(
                name=f"{module}.{leaf}",
                out_features=info.shape[0],
                in_features=info.shape[1],
                bits=bits,
                group_size=group_size,
                symmetric=symmetric,
                fused_names=tuple(f"{module}.{member}" for member in group),
                fused_name=f"{module}.{fused}",
            )
        )
    return layouts


def mixed_story_layouts() -> list[LinearLayout]:
    """4 bits, but 8 bits for the feed-forward inputs of layers 1 and 4, and a dense down projection in layer 2."""
    layouts = []
    for layout in story_layouts():
        if layout.fused_name.endswith("gate_up_proj") and layout.name.split(".")[2] in ("1", "4"):
            layout = replace(layout, bits=8, group_size=32)
        if layout.name == "model.layers.2.mlp.down_proj":
            layout = replace(layout, bits=None, dense_reason="rule")
        layouts.append(layout)
    return layouts


def quantize_all(source: TensorSource, layouts: Sequence[LinearLayout], *, format_name: str) -> dict[str, AffineWeight]:
    """Round-to-nearest weights of all quantized layouts, by name, with the scale dtype of the format."""
    form = format_named(format_name)
    weights = {}
    for layout in layouts:
        if layout.bits is not None:
            weight = source.read(f"{layout.name}.weight")
            weight_OI = weight.t() if layout.stored_transposed else weight
            weights[layout.name] = round_to_nearest(weight_OI, layout, scale_dtype=form.scale_dtype(weight.dtype))
    return weights


def write_checkpoint(
    source: TensorSource,
    output: Path,
    layouts: Sequence[LinearLayout],
    weights: Mapping[str, AffineWeight],
    *,
    format_name: str,
    max_shard_bytes: int = 10**9,
) -> CheckpointFolder:
    """Write, publish and open a checkpoint, as the main job does but without its checks."""
    form = format_named(format_name)
    with staging_folder(output, overwrite=False, source=source.path) as staging:
        writer = ShardWriter(staging.path, plan_entries(source, layouts, form), max_shard_bytes=max_shard_bytes)
        copy_dense(source, writer, layouts)
        for layout in layouts:
            if layout.bits is not None:
                for name, tensor in form.encode(layout, weights[layout.name]).items():
                    writer.write(name, tensor)
        writer.finish()
        write_side_files(source, staging.path, form, layouts)
        staging.publish()
    return CheckpointFolder.open(output)


def random_weight(layout: LinearLayout, *, seed: int = 0, scale_dtype: torch.dtype = torch.float16) -> AffineWeight:
    """Random codes, scales and zero points that every format holds exactly."""
    assert layout.bits is not None
    generator = torch.Generator().manual_seed(seed)
    rows, columns = layout.out_features, layout.in_features
    group_size = columns if layout.group_size == -1 else layout.group_size
    shape = (rows, -(-columns // group_size))
    middle = 2 ** (layout.bits - 1)
    zero_OG = torch.randint(1, 2**layout.bits, shape, dtype=torch.int32, generator=generator)
    return AffineWeight(
        codes_OI=torch.randint(0, 2**layout.bits, (rows, columns), dtype=torch.uint8, generator=generator),
        scale_OG=exact_scale(torch.rand(shape, generator=generator)).to(scale_dtype),
        zero_point_OG=torch.full_like(zero_OG, middle) if layout.symmetric else zero_OG,
        bits=layout.bits,
        group_size=group_size,
        symmetric=layout.symmetric,
    )


def same_weight(first: AffineWeight, second: AffineWeight) -> bool:
    """Every field equal, scales also in dtype."""
    tensors = [(first.codes_OI, second.codes_OI), (first.scale_OG, second.scale_OG)]
    tensors.append((first.zero_point_OG, second.zero_point_OG))
    fields = [(weight.bits, weight.group_size, weight.symmetric) for weight in (first, second)]
    indices = [weight.group_index_I for weight in (first, second)]
    same_index = indices[0] is indices[1] or (
        indices[0] is not None and indices[1] is not None and torch.equal(indices[0], indices[1])
    )
    same_tensors = all(left.dtype == right.dtype and torch.equal(left, right) for left, right in tensors)
    return same_tensors and fields[0] == fields[1] and same_index


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object]) -> CheckpointFolder:
    """Write and open a bare checkpoint: these tensors and this config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = ShardWriter(folder, entries, max_shard_bytes=10**9)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    (folder / "config.json").write_text(json.dumps(config))
    return CheckpointFolder.open(folder)


def write_linears(
    folder: Path,
    layouts: Sequence[LinearLayout],
    weights: Mapping[str, AffineWeight],
    *,
    format_name: str,
    config: Mapping[str, object] | None = None,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> CheckpointFolder:
    """Write and open linears alone.

    `config` changes keys of the quantization_config, `replaced` changes tensors: for files that others wrote.
    """
    form = format_named(format_name)
    tensors: dict[str, torch.Tensor] = {}
    for layout in layouts:
        if layout.bits is not None:
            tensors |= form.encode(layout, weights[layout.name])
    tensors |= replaced or {}
    quantization = {**form.quantization_config(layouts), **(config or {})}
    return write_tensors(folder, tensors, {"model_type": "llama", "quantization_config": quantization})
