"""Patterns match exactly the names they were made of."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import story_layouts, write_tensors

from optgptq.formats.naming import engine_names, exact_patterns, with_engine_names

PARTS = st.sampled_from(["model", "layers", "0", "1", "10", "self_attn", "q_proj", "a+b", "mlp"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)


@given(wanted=st.sets(NAMES, max_size=12), others=st.sets(NAMES, max_size=12))
def test_patterns_match_the_names_and_no_others(wanted: set[str], others: set[str]) -> None:
    patterns = exact_patterns(wanted)
    for name in wanted | others:
        assert any(re.match(pattern, name) for pattern in patterns) is (name in wanted)


def test_layers_share_a_pattern() -> None:
    names = [f"model.layers.{layer}.mlp.{leaf}" for layer in range(40) for leaf in ("up_proj", "gate_proj")]
    (pattern,) = exact_patterns(names)
    assert pattern.startswith(r"^model\.layers\.(?:0|1|2|")
    assert pattern.endswith(r"|39)\.(?:mlp\.gate_proj|mlp\.up_proj)$")
    assert exact_patterns(["lm_head"]) == ("^lm_head$",)


def test_engine_names_are_plain_and_fused() -> None:
    layouts = [layout for layout in story_layouts() if layout.name.startswith("model.layers.0.self_attn")]
    prefix = "model.layers.0.self_attn"
    assert engine_names(layouts) == [
        f"{prefix}.{leaf}" for leaf in ("k_proj", "o_proj", "q_proj", "qkv_proj", "v_proj")
    ]
    assert engine_names([replace(layouts[0], fused_name="")]) == [layouts[0].name]


def test_dense_matrices_of_a_quantized_folder(tmp_path: Path) -> None:
    matrix, vector = torch.zeros(4, 8), torch.zeros(4)
    tensors = {
        "model.embed_tokens.weight": matrix,
        "lm_head.weight": matrix,
        "model.layers.0.mlp.gate_proj.weight": matrix,
        "model.layers.0.mlp.up_proj.weight": matrix,
        "model.layers.0.mlp.up_proj.bias": vector,
        "model.norm.weight": vector,
        "model.layers.0.mask.weight": torch.zeros(4, 4, dtype=torch.int64),
    }
    folder = write_tensors(tmp_path, tensors, {"model_type": "llama"})
    found = {layout.name: layout for layout in with_engine_names(folder, [])}
    assert sorted(found) == ["lm_head", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    gate = found["model.layers.0.mlp.gate_proj"]
    assert gate.fused_names == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    assert gate.fused_name == "model.layers.0.mlp.gate_up_proj"
    assert (gate.bits, gate.out_features, gate.in_features) == (None, 4, 8)
    assert found["lm_head"].fused_name == "lm_head"
