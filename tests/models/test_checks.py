"""Damaged and foreign checkpoints are refused by name before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import TINY_MODELS, random_tokens, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import ExitCode, ModelError
from optgptq.models.checks import check_inventory, require_finite
from optgptq.models.decoder import load_decoder
from optgptq.models.registry import model_spec

LLAMA = next(tiny for tiny in TINY_MODELS if tiny.name == "llama-grouped_query")
TIED = next(tiny for tiny in TINY_MODELS if tiny.name == "llama-tied")
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_reference(reference_model(LLAMA), tmp_path / "model")


def rewrite(folder: Path, **changes: torch.Tensor | None) -> CheckpointFolder:
    """Replace tensors, or remove those given as None, and open the folder."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return CheckpointFolder.open(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [GATE, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, name: str, value: float) -> None:
    tensor = load_file(folder / "model.safetensors")[name].clone()
    tensor.view(-1)[5] = value
    opened = rewrite(folder, **{name: tensor})
    with pytest.raises(ModelError) as caught:
        load_decoder(opened)
    assert name in caught.value.where
    assert caught.value.found == f"1 of {tensor.numel()} values NaN or infinite"
    assert caught.value.exit_code == ExitCode.INPUT


def test_weights_too_large_for_the_dtype_are_refused(folder: Path) -> None:
    opened = rewrite(folder, **{GATE: torch.full((38, 24), 1e6)})
    load_decoder(opened)
    with pytest.raises(ModelError, match="finite weights in float16"):
        load_decoder(opened, dtype=torch.float16)


def test_empty_tensors_are_finite() -> None:
    require_finite(torch.empty(0, 3), where="nothing")


def test_a_wrong_shape_names_tensor_and_both_shapes(folder: Path) -> None:
    opened = rewrite(folder, **{GATE: torch.zeros(24, 38)})
    with pytest.raises(ModelError) as caught:
        check_inventory(opened, model_spec(opened))
    assert GATE in caught.value.where
    assert (caught.value.expected, caught.value.found) == ("shape [38, 24]", "shape [24, 38]")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    opened = rewrite(folder, **{GATE: None})
    with pytest.raises(ModelError, match="no such tensor") as caught:
        load_decoder(opened)
    assert GATE in caught.value.where


def test_fused_experts_and_other_unknown_tensors_are_named(folder: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    opened = rewrite(folder, **{name: torch.zeros(2, 3, 4)})
    with pytest.raises(ModelError) as caught:
        load_decoder(opened)
    assert name in caught.value.where
    assert "[2, 3, 4]" in caught.value.found
    assert "Fused experts are not implemented" in caught.value.action


def test_a_bias_the_config_does_not_promise_is_not_ignored(folder: Path) -> None:
    opened = rewrite(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(24)})
    with pytest.raises(ModelError, match="unknown tensor"):
        load_decoder(opened)


def test_weights_that_are_not_floating_point_are_refused(folder: Path) -> None:
    opened = rewrite(folder, **{GATE: torch.zeros(38, 24, dtype=torch.int8)})
    with pytest.raises(ModelError, match="found I8"):
        load_decoder(opened)


def test_rotary_buffers_of_old_checkpoints_are_left_out(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_decoder(rewrite(folder, **{name: torch.zeros(2)}))


def test_tensors_of_supplied_linears_are_not_looked_at(folder: Path) -> None:
    linear = "model.layers.1.mlp.gate_proj"
    opened = rewrite(
        folder,
        **{GATE: None, f"{linear}.qweight": torch.zeros(3, 38, dtype=torch.int32), f"{linear}.bias": torch.ones(38)},
    )
    check_inventory(opened, model_spec(opened), supplied=(linear,))
    with pytest.raises(ModelError):
        check_inventory(opened, model_spec(opened))


def test_a_tied_pair_may_be_stored_under_either_name_or_both(tmp_path: Path) -> None:
    folder = save_reference(reference_model(TIED), tmp_path / "model")
    tokens_BS = random_tokens(1, 9)
    expected = load_decoder(CheckpointFolder.open(folder)).logits(tokens_BS)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    both = rewrite(folder, **{"lm_head.weight": embedding})
    assert torch.equal(load_decoder(both).logits(tokens_BS), expected)
    head_only = rewrite(folder, **{"model.embed_tokens.weight": None})
    assert torch.equal(load_decoder(head_only).logits(tokens_BS), expected)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight"):
        load_decoder(rewrite(folder, **{"lm_head.weight": None}))


def test_a_head_of_its_own_is_used_even_where_the_config_says_tied(tmp_path: Path) -> None:
    model = reference_model(LLAMA)
    folder = save_reference(model, tmp_path / "model")
    tokens_BS = random_tokens(1, 9)
    expected = load_decoder(CheckpointFolder.open(folder)).logits(tokens_BS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert torch.equal(load_decoder(CheckpointFolder.open(folder)).logits(tokens_BS), expected)


def test_scales_for_the_fp8_cache_of_other_engines_change_nothing(folder: Path) -> None:
    tokens_BS = random_tokens(1, 9)
    before = load_decoder(CheckpointFolder.open(folder)).logits(tokens_BS)
    names = [f"model.layers.{index}.self_attn.{leaf}" for index in range(3) for leaf in ("k_scale", "v_scale")]
    opened = rewrite(folder, **{name: torch.tensor([0.5]) for name in names})
    check_inventory(opened, model_spec(opened))
    assert torch.equal(load_decoder(opened).logits(tokens_BS), before)
    for unknown in ("model.layers.3.self_attn.k_scale", "model.layers.0.self_attn.q_scale", "model.layers.0.k_scale"):
        with pytest.raises(ModelError, match="an unknown tensor"):
            check_inventory(rewrite(folder, **{unknown: torch.ones(1)}), model_spec(opened))
        rewrite(folder, **{unknown: None})
