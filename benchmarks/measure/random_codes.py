"""A Llama whose linears are random codes, in two folders: as a GPTQ checkpoint, and as the dense model of its numbers.

Nothing is quantized: codes are drawn, so that folders of any size are there in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from measure.random_llama import WEIGHT_DEVIATION, LlamaShape, llama_config
from optgptq.affine_weight import AffineWeight
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.writer import ShardWriter, TensorEntry
from optgptq.formats import format_named
from optgptq.formats.checkpoint import copy_dense, plan_entries, write_side_files
from optgptq.layout import LinearLayout

_SHARD_BYTES = 10**9
_DTYPE = torch.bfloat16
HEAD = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModel:
    """What is drawn.

    Attributes:
        shape, num_layers, vocabulary, eps: of the model; its head is not tied.
        bits, group_size: of its linears, which are symmetric.
        head_bits: of its output head, in the same groups; 16: it stays in bfloat16.
        seed: of everything.
    """

    shape: LlamaShape
    num_layers: int
    vocabulary: int
    eps: float = 1e-5
    bits: int = 4
    group_size: int = 128
    head_bits: int = 16
    seed: int = 0

    @property
    def name(self) -> str:
        """A name for folders."""
        bits = f"{self.bits}-bits-head-{self.head_bits}"
        return f"random-codes-{self.shape.width}-{self.num_layers}-layers-{bits}-seed-{self.seed}"


def random_pair(folder: Path, model: RandomModel) -> tuple[Path, Path]:
    """Return the folders of the quantized and of the dense model, made there unless they are complete already."""
    quantized, dense = folder / model.name, folder / f"{model.name}-dense"
    layouts = list(_layouts(model))
    if not (dense / "config.json").is_file():
        _write_dense(dense, model, layouts)
    if not (quantized / "config.json").is_file():
        _write_quantized(quantized, CheckpointFolder.open(dense), model, layouts)
    return quantized, dense


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's tensors."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _layouts(model: RandomModel) -> Iterator[LinearLayout]:
    shape = model.shape
    width, feed_forward, values = shape.width, shape.feed_forward, shape.num_kv_heads * shape.head_size
    for index in range(model.num_layers):
        for name, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", values, width),
            ("self_attn.v_proj", values, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", feed_forward, width),
            ("mlp.up_proj", feed_forward, width),
            ("mlp.down_proj", width, feed_forward),
        ):
            yield _layout(model, f"model.layers.{index}.{name}", rows, columns, model.bits)
    if model.head_bits < 16:
        yield _layout(model, HEAD, model.vocabulary, width, model.head_bits)


def _layout(model: RandomModel, name: str, rows: int, columns: int, bits: int) -> LinearLayout:
    return LinearLayout(
        name=name, out_features=rows, in_features=columns, bits=bits, group_size=model.group_size, symmetric=True
    )


def _weight(model: RandomModel, layouts: list[LinearLayout], number: int) -> AffineWeight:
    """Return the same weight at each call; its numbers have the deviation that models begin with."""
    layout = layouts[number]
    generator = torch.Generator().manual_seed(model.seed * len(layouts) + number)
    shape = (layout.out_features, layout.in_features // model.group_size)
    assert layout.bits is not None
    levels = 2**layout.bits
    # Even codes have a deviation of levels / sqrt(12).
    scale = WEIGHT_DEVIATION * 12**0.5 / levels
    scale_OG = (scale * (0.75 + 0.5 * torch.rand(shape, generator=generator))).to(_DTYPE)
    return AffineWeight(
        codes_OI=torch.randint(0, levels, (shape[0], layout.in_features), dtype=torch.uint8, generator=generator),
        scale_OG=scale_OG.to(torch.float16),
        zero_point_OG=torch.full(shape, levels // 2, dtype=torch.int32),
        bits=layout.bits,
        group_size=model.group_size,
        symmetric=True,
    )


def _dense_tensors(model: RandomModel) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(model.seed)
    width = model.shape.width
    for name in ("model.embed_tokens", *([HEAD] if model.head_bits == 16 else [])):
        matrix = torch.randn(model.vocabulary, width, generator=generator) * WEIGHT_DEVIATION
        yield f"{name}.weight", matrix.to(_DTYPE)
    norms = ["model.norm"]
    for index in range(model.num_layers):
        norms += [f"model.layers.{index}.{name}_layernorm" for name in ("input", "post_attention")]
    for name in norms:
        yield f"{name}.weight", torch.ones(width, dtype=_DTYPE)


def _write_dense(folder: Path, model: RandomModel, layouts: list[LinearLayout]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    others = dict(_dense_tensors(model))
    entries = [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in others.items()]
    entries += [
        TensorEntry(f"{layout.name}.weight", _DTYPE, (layout.out_features, layout.in_features)) for layout in layouts
    ]
    writer = ShardWriter(folder, entries, max_shard_bytes=_SHARD_BYTES)
    for name, tensor in others.items():
        writer.write(name, tensor)
    for number, layout in enumerate(layouts):
        writer.write(f"{layout.name}.weight", _weight(model, layouts, number).dequantize(_DTYPE))
    writer.finish()
    config = llama_config(model.num_layers, model.shape, vocabulary=model.vocabulary, eps=model.eps)
    # Last, since it marks the folder as complete.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _write_quantized(folder: Path, source: CheckpointFolder, model: RandomModel, layouts: list[LinearLayout]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    form = format_named("gptq")
    writer = ShardWriter(folder, plan_entries(source, layouts, form), max_shard_bytes=_SHARD_BYTES)
    copy_dense(source, writer, layouts)
    for number, layout in enumerate(layouts):
        for name, tensor in form.encode(layout, _weight(model, layouts, number)).items():
            writer.write(name, tensor)
    writer.finish()
    write_side_files(source, folder, form, layouts)
