"""Families are found by architecture, and checkpoints under all spellings of their tensor names and configs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import TINY_MODELS, random_tokens, reference_logits, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import ModelError
from optgptq.models.decoder import load_decoder
from optgptq.models.registry import FAMILIES, config_spec, family_of, model_spec

BY_NAME = {tiny.name: tiny for tiny in TINY_MODELS}


def test_every_architecture_belongs_to_one_family() -> None:
    architectures = [name for family in FAMILIES for name in family.architectures]
    assert len(architectures) == len(set(architectures))
    for family in FAMILIES:
        assert family_of({"architectures": list(family.architectures)}) is family
        assert family_of({"model_type": family.name}) is family


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"architectures": ["MixtralForCausalLM"], "model_type": "llama"}, "MixtralForCausalLM"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
        ({"model_type": "bert"}, "model_type 'bert' without architectures"),
        ({}, "model_type None without architectures"),
    ],
)
def test_unknown_architectures_are_named_with_the_known_ones(config: dict[str, Any], found: str) -> None:
    with pytest.raises(ModelError) as caught:
        family_of(config)
    assert caught.value.found == found
    assert "LlamaForCausalLM" in caught.value.expected
    assert "FalconForCausalLM" in caught.value.expected


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("gpt2-conv1d", lambda name: name.removeprefix("transformer.")),
        ("bloom-alibi", lambda name: name.removeprefix("transformer.")),
        ("opt-pre_norm", lambda name: name.removeprefix("model.")),
        ("gptneox-parallel", lambda name: name.replace("lm_head", "embed_out")),
        ("gptneox-sequential", lambda name: name.replace("embed_out", "lm_head")),
    ],
)
def test_checkpoints_with_other_names_give_the_same_logits(
    name: str, renamed: Callable[[str], str], tmp_path: Path
) -> None:
    model = reference_model(BY_NAME[name])
    folder = save_reference(model, tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = {renamed(old): tensor.clone() for old, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    opened = CheckpointFolder.open(folder)
    spec = model_spec(opened)
    assert f"{spec.linear_names(1, 'qkv')[0]}.weight" in opened.tensors
    tokens_BS = random_tokens(2, 15)
    expected = reference_logits(model, tokens_BS)
    assert float((load_decoder(opened).logits(tokens_BS) - expected).abs().max() / expected.abs().max()) < 2e-5


@pytest.mark.parametrize("name", ["gpt2-conv1d", "gptneox-parallel"])
def test_masks_in_old_checkpoints_are_left_out(name: str, tmp_path: Path) -> None:
    folder = save_reference(reference_model(BY_NAME[name]), tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    attention = "transformer.h.0.attn" if name.startswith("gpt2") else "gpt_neox.layers.0.attention"
    tensors |= {f"{attention}.bias": torch.ones(1, 1, 4, 4), f"{attention}.masked_bias": torch.tensor(-1e9)}
    save_file(tensors, path, metadata={"format": "pt"})
    load_decoder(CheckpointFolder.open(folder))


def _old_spelling(config: Mapping[str, Any], **moved: Any) -> dict[str, Any]:
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    return {**old, "torch_dtype": "float32", **moved}


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("llama-grouped_query", {"rope_theta": 10_000.0, "rope_scaling": None}),
        (
            "llama-rope_llama3",
            {
                "rope_theta": 5000.0,
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
        ("llama-rope_linear", {"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        (
            "gemma3text-local_global",
            {
                "rope_theta": 100_000.0,
                "rope_local_base_freq": 500.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 2,
                "layer_types": None,
            },
        ),
        (
            "phi3-longrope",
            {
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.75,
                "rope_scaling": {
                    "type": "su",
                    "short_factor": [1.0, 1.1, 1.3],
                    "long_factor": [1.5, 2.0, 4.0],
                },
            },
        ),
        ("gptneox-full_rotary", {"rotary_pct": 1.0, "rotary_emb_base": 1000}),
    ],
)
def test_configs_of_transformers_4_and_5_give_the_same_spec(name: str, moved: dict[str, Any], tmp_path: Path) -> None:
    folder = save_reference(reference_model(BY_NAME[name]), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config_spec(_old_spelling(config, **moved)) == config_spec(config)
