"""A Llama of width 1024 with random weights, for figures that depend on sizes and not on what a model knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from optgptq.bundled import bundled_path

WIDTH = 1024
FEED_FORWARD = 2816
NUM_HEADS = 16
NUM_KV_HEADS = 8
HEAD_SIZE = WIDTH // NUM_HEADS
VOCABULARY = 1024
# What transformers initialises linears with.
WEIGHT_DEVIATION = 0.02


def random_llama(folder: Path, *, num_layers: int, seed: int = 0) -> Path:
    """Return the folder of the model, made there unless it is complete already; bfloat16, story-llama's tokenizer."""
    path = folder / f"random-llama-{num_layers}-layers-seed-{seed}"
    if (path / "config.json").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(bundled_path("story-llama") / name, path / name)
    save_file(_tensors(num_layers, seed), path / "model.safetensors", metadata={"format": "pt"})
    # Last, since it marks the folder as complete.
    (path / "config.json").write_text(json.dumps(_config(num_layers), indent=2) + "\n", "utf-8")
    return path


def _config(num_layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "max_position_embeddings": 1024,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": NUM_HEADS,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": NUM_KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }


def _tensors(num_layers: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def linear(out_features: int, in_features: int) -> torch.Tensor:
        return (torch.randn(out_features, in_features, generator=generator) * WEIGHT_DEVIATION).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": linear(VOCABULARY, WIDTH), "lm_head.weight": linear(VOCABULARY, WIDTH)}
    ones = torch.ones(WIDTH, dtype=torch.bfloat16)
    for index in range(num_layers):
        layer = f"model.layers.{index}"
        tensors |= {
            f"{layer}.self_attn.q_proj.weight": linear(NUM_HEADS * HEAD_SIZE, WIDTH),
            f"{layer}.self_attn.k_proj.weight": linear(NUM_KV_HEADS * HEAD_SIZE, WIDTH),
            f"{layer}.self_attn.v_proj.weight": linear(NUM_KV_HEADS * HEAD_SIZE, WIDTH),
            f"{layer}.self_attn.o_proj.weight": linear(WIDTH, NUM_HEADS * HEAD_SIZE),
            f"{layer}.mlp.gate_proj.weight": linear(FEED_FORWARD, WIDTH),
            f"{layer}.mlp.up_proj.weight": linear(FEED_FORWARD, WIDTH),
            f"{layer}.mlp.down_proj.weight": linear(WIDTH, FEED_FORWARD),
            f"{layer}.input_layernorm.weight": ones.clone(),
            f"{layer}.post_attention_layernorm.weight": ones.clone(),
        }
    tensors["model.norm.weight"] = ones.clone()
    return tensors
