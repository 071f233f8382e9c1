"""The view itself: tensors as the formulas say, names, chunks, refusals of values, and what is written from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import quantize_all, write_checkpoint
from support.quantizable import tiny_model
from support.transformed import (
    EVERYTHING,
    FOLD,
    RESIDUAL,
    VALUES,
    rewritten,
    saved,
    transformed,
)

from optgptq.errors import ModelError
from optgptq.formats.verify import verify_written, weight_digest
from optgptq.layout import LinearLayout
from optgptq.models.inventory import model_linears
from optgptq.models.registry import model_spec
from optgptq.transforms.settings import TransformSettings
from optgptq.transforms.source import transformed_source


def test_llama_tensors_are_those_of_the_formulas(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama-grouped_query"), tmp_path / "model")
    view = transformed(folder, RESIDUAL)
    assert view.residual is not None
    rotation_MM = view.residual.apply(torch.eye(24, dtype=torch.float64))
    norm_M = folder.read("model.layers.1.post_attention_layernorm.weight")
    expected = {
        "model.embed_tokens.weight": folder.read("model.embed_tokens.weight") @ rotation_MM,
        "model.layers.1.mlp.up_proj.weight": folder.read("model.layers.1.mlp.up_proj.weight") * norm_M @ rotation_MM,
        "model.layers.1.mlp.down_proj.weight": rotation_MM.T @ folder.read("model.layers.1.mlp.down_proj.weight"),
        "lm_head.weight": folder.read("lm_head.weight") * folder.read("model.norm.weight") @ rotation_MM,
        "model.norm.weight": torch.ones(24, dtype=torch.float64),
    }
    for name, tensor in expected.items():
        assert torch.allclose(view.read(name), tensor, rtol=0, atol=1e-12), name


def test_norms_become_identities_in_their_stored_form(tmp_path: Path) -> None:
    for tiny, weight in (("gemma-plain", 0.0), ("qwen2-biases", 1.0)):
        view = transformed(saved(tiny_model(tiny), tmp_path / tiny), FOLD)
        assert len(view.norms) == 6
        for name in view.norms:
            assert bool((view.read(f"{name}.weight") == weight).all())


def test_a_norm_bias_that_cannot_stay_is_refused(tmp_path: Path) -> None:
    """This Falcon has norms with biases and linears without."""
    folder = saved(tiny_model("falcon-multi_query"), tmp_path / "model")
    norm = "transformer.h.1.input_layernorm"
    tensors = {name: folder.read(name) for name in folder.tensors}
    tensors[f"{norm}.weight"][3] = 0.0
    with pytest.raises(ModelError) as caught:
        transformed(rewritten(folder, tensors, tmp_path / "zero"), FOLD)
    assert caught.value.where.endswith(f": {norm}")
    assert "a smallest weight of 0 and" in caught.value.found
    # Without a bias beside it, a weight of zero is as good as any.
    tensors[f"{norm}.bias"][3] = 0.0
    transformed(rewritten(folder, tensors, tmp_path / "both-zero"), FOLD)


def test_the_bound_on_a_kept_bias_follows_the_stored_dtype(tmp_path: Path) -> None:
    for dtype, allowed in ((torch.bfloat16, 7.9), (torch.float16, 63.0)):
        folder = saved(tiny_model("falcon-multi_query"), tmp_path / f"{dtype}", dtype=dtype)
        tensors = {name: folder.read(name) for name in folder.tensors}
        norm = "transformer.h.0.input_layernorm"
        tensors[f"{norm}.weight"].fill_(0.25)
        tensors[f"{norm}.bias"].fill_(0.25 * allowed)
        transformed(rewritten(folder, tensors, tmp_path / f"{dtype}-inside"), FOLD)
        tensors[f"{norm}.bias"].mul_(1.1)
        with pytest.raises(ModelError, match="weights large enough to divide the bias by"):
            transformed(rewritten(folder, tensors, tmp_path / f"{dtype}-outside"), FOLD)


def test_values_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama-grouped_query"), tmp_path / "model", dtype=torch.float16)
    tensors = {name: folder.read(name) for name in folder.tensors}
    tensors["model.layers.0.input_layernorm.weight"].fill_(1e4)
    tensors["model.layers.0.self_attn.q_proj.weight"][5, 2] = 1e3
    view = transformed(rewritten(folder, tensors, tmp_path / "large"), FOLD)
    with pytest.raises(ModelError, match=r"q_proj\.weight: expected transformed values up to 65504.*found 1e\+07"):
        view.read("model.layers.0.self_attn.q_proj.weight")


def test_large_tables_are_changed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = transformed(saved(tiny_model("gpt2-conv1d"), tmp_path / "model"), EVERYTHING)
    whole = {name: view.read(name) for name in view.tensors}
    monkeypatch.setattr("optgptq.transforms.source._ELEMENTS_PER_BLOCK", 100)
    for name, tensor in whole.items():
        assert torch.allclose(view.read(name), tensor, rtol=0, atol=1e-12)


def test_chunks_are_the_bytes_of_the_tensor(tmp_path: Path) -> None:
    view = transformed(saved(tiny_model("qwen2-biases"), tmp_path / "model"), VALUES)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.norm.weight"):
        chunks = [chunk.clone() for chunk in view.read_chunks(name, 100)]
        assert all(chunk.numel() == 100 for chunk in chunks[:-1])
        assert torch.equal(torch.cat(chunks), view.read(name).reshape(-1).view(torch.uint8))


def test_nothing_asked_changes_nothing(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama-grouped_query"), tmp_path / "model")
    spec = model_spec(folder)
    assert transformed_source(folder, spec, TransformSettings()) == (folder, spec)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    view = transformed(saved(tiny_model("llama-grouped_query"), tmp_path / "model"), VALUES)
    with pytest.raises(ModelError, match=r"tensor no\.such"):
        view.info("no.such")


@pytest.mark.parametrize("tiny", ["llama-tied", "gpt2-conv1d"])
def test_a_quantized_checkpoint_of_a_view_is_written_and_verified(tiny: str, tmp_path: Path) -> None:
    folder = saved(tiny_model(tiny), tmp_path / "model", dtype=torch.float32)
    view = transformed(folder, EVERYTHING)
    layouts = [
        LinearLayout(
            name=linear.name,
            out_features=linear.out_features,
            in_features=linear.in_features,
            bits=8,
            group_size=-1,
            symmetric=True,
            stored_transposed=linear.stored_transposed,
            fused_names=(linear.name,),
            fused_name=linear.name,
        )
        for linear in model_linears(model_spec(view))
        if linear.stage in ("qkv", "o")
    ]
    weights = quantize_all(view, layouts, format_name="gptq")
    written = write_checkpoint(view, tmp_path / "out", layouts, weights, format_name="gptq")
    digests = {name: weight_digest(weight) for name, weight in weights.items()}
    verify_written(written, view, layouts, digests)
    assert written.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in written.tensors
