"""Models from checkpoints of every format, with dense and with quantized weights."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import mixed_story_layouts, quantize_all, write_checkpoint
from support.tiny_models import random_tokens

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import FormatError, ModelError
from optgptq.kernels.reference import affine_matmul
from optgptq.models.linear import Linear
from optgptq.runtime.linear import QuantLinear
from optgptq.runtime.load import load_model

STORY = bundled_path("bundled:story-llama")


def quantized(folder, *, format_name: str = "gptq"):
    source, layouts = CheckpointFolder.open(STORY), mixed_story_layouts()
    weights = quantize_all(source, layouts, format_name=format_name)
    return write_checkpoint(source, folder, layouts, weights, format_name=format_name).path, weights


@pytest.mark.parametrize("format_name", ["gptq", "gptq_v2", "compressed-tensors"])
def test_dense_and_quantized_weights_give_the_same_logits(tmp_path, format_name):
    folder, weights = quantized(tmp_path / "out", format_name=format_name)
    dense, kept = load_model(folder), load_model(folder, weights="quantized")
    name = "self_attn.q_proj"
    assert isinstance(dense.layers[1].linears[name], Linear)
    assert isinstance(kept.layers[1].linears[name], QuantLinear)
    # A linear that stays dense is dense in both.
    assert isinstance(kept.layers[2].linears["mlp.down_proj"], Linear)
    expected = weights[f"model.layers.1.{name}"].dequantize()
    assert torch.equal(dense.layers[1].linears[name].weight_OI, expected)
    tokens_BS = random_tokens(2, 19, vocab_size=1024)
    torch.testing.assert_close(kept.logits(tokens_BS), dense.logits(tokens_BS), rtol=1e-4, atol=1e-4)


def test_a_dense_model_is_the_same_in_both_ways():
    tokens_BS = random_tokens(1, 9, vocab_size=1024)
    assert torch.equal(load_model(STORY).logits(tokens_BS), load_model(STORY, weights="quantized").logits(tokens_BS))


def test_the_kernel_is_said_once_and_can_be_replaced(tmp_path, caplog):
    folder, _ = quantized(tmp_path / "out")
    calls = []

    def counting(x, weight, *, bias_O=None):
        calls.append(weight.out_features)
        return affine_matmul(x, weight, bias_O=bias_O)

    with caplog.at_level(logging.INFO, logger="optgptq"):
        load_model(folder, weights="quantized")
    assert [record.message for record in caplog.records if "kernel" in record.message] == [
        "reference kernel for quantized linears: plain torch (dequantize, then matmul) on cpu in float32: "
        "the only kernel there is"
    ]
    decoder = load_model(folder, weights="quantized", kernel=counting)
    decoder.logits(random_tokens(1, 3, vocab_size=1024))
    assert len(calls) == 41


def test_a_bias_of_a_quantized_linear_is_used(tmp_path):
    folder, _ = quantized(tmp_path / "out")
    before = load_model(folder).logits(random_tokens(1, 5, vocab_size=1024))
    change(folder, "model.layers.0.self_attn.v_proj.bias", torch.full((64,), 0.5))
    changed = load_model(folder)
    assert changed.layers[0].linears["self_attn.v_proj"].bias_O.tolist() == [0.5] * 64
    assert not torch.allclose(changed.logits(random_tokens(1, 5, vocab_size=1024)), before)


def change(folder, name: str, tensor: torch.Tensor) -> None:
    """Replace or add one tensor of a checkpoint of one file."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), name: tensor}
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def test_scales_that_are_not_finite_are_refused(tmp_path):
    folder, _ = quantized(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.scales"
    scales = load_file(folder / "model.safetensors")[name]
    scales[0, 3] = torch.nan
    change(folder, name, scales)
    with pytest.raises(FormatError, match=r"mlp\.up_proj"):
        load_model(folder)


def test_quantized_shapes_that_contradict_the_config_are_refused(tmp_path):
    folder, _ = quantized(tmp_path / "out")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 384', '"intermediate_size": 320'))
    with pytest.raises((FormatError, ModelError), match=r"384|320"):
        load_model(folder)


def test_a_quantized_head_is_refused(tmp_path):
    folder, _ = quantized(tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.0.self_attn.q_proj."
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensors["lm_head." + name.removeprefix(prefix)] = tensors[name].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises((FormatError, ModelError), match="lm_head"):
        load_model(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    shutil.copytree(STORY, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="no weights"):
        load_model(tmp_path / "empty")
