"""A model folder as large as a model of 70 billion weights, with true headers and files that hold nothing but holes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from optgptq.bundled import bundled_path
from optgptq.checkpoint.safetensors_header import build_header

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def write_large_llama(folder: Path, *, num_shards: int = 30, **values: Any) -> Path:
    """Write the folder; its files take no room on a file system that knows holes."""
    config = {**LLAMA_70B, **values}
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled_path("story-llama") / name, folder / name)
    shapes = list(_shapes(config).items())
    weight_map: dict[str, str] = {}
    per_shard = -(-len(shapes) // num_shards)
    for shard in range(num_shards):
        part = shapes[shard * per_shard : (shard + 1) * per_shard]
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        header = build_header([(tensor, torch.bfloat16, shape) for tensor, shape in part], {"format": "pt"})
        num_bytes = sum(2 * torch.Size(shape).numel() for _, shape in part)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + num_bytes)
        weight_map |= dict.fromkeys((tensor for tensor, _ in part), name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, values = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "lm_head.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (queries, width),
            f"{layer}.self_attn.k_proj.weight": (values, width),
            f"{layer}.self_attn.v_proj.weight": (values, width),
            f"{layer}.self_attn.o_proj.weight": (width, queries),
            f"{layer}.mlp.gate_proj.weight": (inner, width),
            f"{layer}.mlp.up_proj.weight": (inner, width),
            f"{layer}.mlp.down_proj.weight": (width, inner),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    return shapes
