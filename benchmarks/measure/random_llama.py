"""A Llama with random weights, for figures that depend on sizes and not on what a model knows."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from optgptq.bundled import bundled_path

VOCABULARY = 1024
# What transformers initialises linears with.
WEIGHT_DEVIATION = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama; heads are `width / num_heads` wide."""

    width: int
    feed_forward: int
    num_heads: int
    num_kv_heads: int

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads


WIDTH_1024 = LlamaShape(width=1024, feed_forward=2816, num_heads=16, num_kv_heads=8)
WIDTH_4096 = LlamaShape(width=4096, feed_forward=14336, num_heads=32, num_kv_heads=8)


def random_llama(folder: Path, *, num_layers: int, shape: LlamaShape = WIDTH_1024, seed: int = 0) -> Path:
    """Return the folder of the model, made there unless it is complete already; bfloat16, story-llama's tokenizer."""
    path = folder / f"random-llama-{shape.width}-{num_layers}-layers-seed-{seed}"
    if (path / "config.json").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(bundled_path("story-llama") / name, path / name)
    save_file(_tensors(num_layers, shape, seed), path / "model.safetensors", metadata={"format": "pt"})
    # Last, since it marks the folder as complete.
    (path / "config.json").write_text(json.dumps(llama_config(num_layers, shape), indent=2) + "\n", "utf-8")
    return path


def llama_config(
    num_layers: int, shape: LlamaShape, *, vocabulary: int = VOCABULARY, eps: float = 1e-6
) -> dict[str, Any]:
    """Return what `config.json` says of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward,
        "max_position_embeddings": 1024,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": eps,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }


def _tensors(num_layers: int, shape: LlamaShape, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def linear(out_features: int, in_features: int) -> torch.Tensor:
        return (torch.randn(out_features, in_features, generator=generator) * WEIGHT_DEVIATION).to(torch.bfloat16)

    width, feed_forward, values = shape.width, shape.feed_forward, shape.num_kv_heads * shape.head_size
    tensors = {"model.embed_tokens.weight": linear(VOCABULARY, width), "lm_head.weight": linear(VOCABULARY, width)}
    ones = torch.ones(width, dtype=torch.bfloat16)
    for index in range(num_layers):
        layer = f"model.layers.{index}"
        tensors |= {
            f"{layer}.self_attn.q_proj.weight": linear(width, width),
            f"{layer}.self_attn.k_proj.weight": linear(values, width),
            f"{layer}.self_attn.v_proj.weight": linear(values, width),
            f"{layer}.self_attn.o_proj.weight": linear(width, width),
            f"{layer}.mlp.gate_proj.weight": linear(feed_forward, width),
            f"{layer}.mlp.up_proj.weight": linear(feed_forward, width),
            f"{layer}.mlp.down_proj.weight": linear(width, feed_forward),
            f"{layer}.input_layernorm.weight": ones.clone(),
            f"{layer}.post_attention_layernorm.weight": ones.clone(),
        }
    tensors["model.norm.weight"] = ones.clone()
    return tensors
