"""Inventory from the spec alone: names, shapes, fused groups."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import TINY_MODELS, TinyModel, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.models.inventory import expected_tensors, model_linears
from optgptq.models.registry import model_spec


@pytest.mark.parametrize("tiny", TINY_MODELS[::3], ids=lambda tiny: tiny.name)
def test_expected_tensors_are_those_that_transformers_writes(tiny: TinyModel, tmp_path: Path) -> None:
    folder = CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path / "model"))
    stored = {name: tuple(info.shape) for name, info in folder.tensors.items()}
    assert expected_tensors(model_spec(folder)) == stored


def test_linears_come_layer_by_layer_and_stage_by_stage_with_engine_names(tmp_path: Path) -> None:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == "llama-grouped_query")
    folder = CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path / "model"))
    linears = model_linears(model_spec(folder))
    assert len(linears) == 3 * 7
    assert [(info.local_name, info.stage, info.out_features, info.in_features) for info in linears[7:14]] == [
        ("self_attn.q_proj", "qkv", 24, 24),
        ("self_attn.k_proj", "qkv", 8, 24),
        ("self_attn.v_proj", "qkv", 8, 24),
        ("self_attn.o_proj", "o", 24, 24),
        ("mlp.gate_proj", "gate_up", 38, 24),
        ("mlp.up_proj", "gate_up", 38, 24),
        ("mlp.down_proj", "down", 24, 38),
    ]
    key, out, up = linears[8], linears[10], linears[12]
    attention = "model.layers.1.self_attn"
    assert key.name == f"{attention}.k_proj"
    assert key.fused_names == (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    assert key.fused_name == f"{attention}.qkv_proj"
    assert (out.fused_names, out.fused_name) == ((out.name,), out.name)
    assert up.fused_name == "model.layers.1.mlp.gate_up_proj"
    assert {info.layer_index for info in linears} == {0, 1, 2}


def test_conv1d_linears_are_described_by_rows_and_columns_not_by_storage(tmp_path: Path) -> None:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == "gpt2-conv1d")
    folder = CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path / "model"))
    fused = model_linears(model_spec(folder))[0]
    assert (fused.name, fused.out_features, fused.in_features) == ("transformer.h.0.attn.c_attn", 72, 24)
    assert fused.stored_transposed
    assert fused.has_bias
    assert tuple(folder.tensors[f"{fused.name}.weight"].shape) == fused.stored_shape == (24, 72)
