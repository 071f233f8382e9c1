"""Models from checkpoints of every format, with dense and with quantized weights."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.binary_weights import plane_layout, random_binary
from support.checkpoints import mixed_story_layouts, quantize_all, story_layouts, write_checkpoint
from support.tiny_models import random_tokens

from optgptq.binary_weight import BinaryWeight
from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import FormatError, ModelError
from optgptq.kernels import choose_affine_matmul, choose_binary_matmul, packed_binary
from optgptq.kernels.native_binary import NativeBinary
from optgptq.kernels.packed_binary import PackedBinary
from optgptq.models.linear import Linear
from optgptq.native.library import load_library
from optgptq.native.products import product_paths
from optgptq.packing import planes
from optgptq.packing.planes import pack_planes
from optgptq.runtime import load
from optgptq.runtime.linear import HELD_KINDS, QuantLinear
from optgptq.runtime.load import load_model

STORY = bundled_path("bundled:story-llama")
needs_native = pytest.mark.skipif(load_library() is None, reason="the native library was not built")


def quantized(folder, *, format_name: str = "gptq"):
    source, layouts = CheckpointFolder.open(STORY), mixed_story_layouts()
    weights = quantize_all(source, layouts, format_name=format_name)
    return write_checkpoint(source, folder, layouts, weights, format_name=format_name).path, weights


@pytest.mark.parametrize("format_name", ["gptq", "gptq_v2", "compressed-tensors"])
def test_dense_and_quantized_weights_give_the_same_logits(tmp_path, format_name):
    folder, weights = quantized(tmp_path / "out", format_name=format_name)
    dense, kept = load_model(folder), load_model(folder, weights="exact")
    name = "self_attn.q_proj"
    assert isinstance(dense.layers[1].linears[name], Linear)
    assert isinstance(kept.layers[1].linears[name], QuantLinear)
    # A linear that stays dense is dense in both.
    assert isinstance(kept.layers[2].linears["mlp.down_proj"], Linear)
    expected = weights[f"model.layers.1.{name}"].dequantize()
    assert torch.equal(dense.layers[1].linears[name].weight_OI, expected)
    tokens_BS = random_tokens(2, 19, vocab_size=1024)
    torch.testing.assert_close(kept.logits(tokens_BS), dense.logits(tokens_BS), rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_activations_in_8_bits_cost_little(tmp_path, bits):
    source, layouts = CheckpointFolder.open(STORY), story_layouts(bits=bits, symmetric=True)
    weights = quantize_all(source, layouts, format_name="gptq")
    folder = write_checkpoint(source, tmp_path / "out", layouts, weights, format_name="gptq").path
    dense, kept = load_model(folder), load_model(folder, weights="quantized")
    tokens_BS = random_tokens(2, 40, vocab_size=1024)
    expected, found = (model.logits(tokens_BS).log_softmax(-1) for model in (dense, kept))
    divergence = (expected.exp() * (expected - found)).sum(-1)
    assert float(divergence.mean()) < 2e-3
    # The same bits for a text alone, and for each of its tokens alone.
    assert torch.equal(kept.layers[0].linears["mlp.up_proj"](torch.ones(1, 128)), _first_row(kept))


def _first_row(decoder):
    return decoder.layers[0].linears["mlp.up_proj"](torch.cat((torch.ones(1, 128), torch.randn(20, 128))))[:1]


def test_a_dense_model_is_the_same_in_both_ways():
    tokens_BS = random_tokens(1, 9, vocab_size=1024)
    assert torch.equal(load_model(STORY).logits(tokens_BS), load_model(STORY, weights="quantized").logits(tokens_BS))


def test_the_kernel_is_said_once_and_can_be_replaced(tmp_path, caplog):
    folder, _ = quantized(tmp_path / "out")
    choice, calls = choose_affine_matmul(torch.device("cpu"), torch.float32), []

    def counting(x, weight, *, bias_O=None):
        calls.append(weight.out_features)
        return choice.call(x, weight, bias_O=bias_O)

    with caplog.at_level(logging.INFO, logger="optgptq"):
        load_model(folder, weights="quantized")
    assert [record.message for record in caplog.records if "kernel" in record.message] == [
        f"{choice.name} kernel for quantized linears: {choice.reason}"
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


def in_planes(folder):
    """Write the bundled model with three sign planes."""
    layouts = [replace(layout, coefficients="float") for layout in story_layouts(bits=3, symmetric=False)]
    weights = {}
    for seed, layout in enumerate(layouts):
        weight = random_binary(layout, seed=seed)
        weights[layout.name] = replace(weight, coefficients=weight.coefficients.map(lambda tensor: tensor * 0.05))
    return write_checkpoint(CheckpointFolder.open(STORY), folder, layouts, weights, format_name="optgptq").path, weights


def test_sign_planes_give_the_logits_of_their_dense_weights(tmp_path):
    folder, weights = in_planes(tmp_path / "out")
    dense, kept, exact = (load_model(folder, weights=way) for way in ("dense", "quantized", "exact"))
    name = "mlp.down_proj"
    expected = weights[f"model.layers.1.{name}"]
    assert torch.equal(dense.layers[1].linears[name].weight_OI, expected.dequantize())
    linear = kept.layers[1].linears[name]
    assert isinstance(linear, QuantLinear)
    assert isinstance(linear.weight, NativeBinary if product_paths() else PackedBinary)
    # A bit for each plane and weight, and coefficients in float16, where codes took a byte for each weight.
    assert linear.weight.nbytes * 8 == expected.codes_OI.numel() * (3 + 16 * (3 + 1) / 64)
    tokens_BS = random_tokens(2, 19, vocab_size=1024)
    expected_BSV = dense.logits(tokens_BS)
    torch.testing.assert_close(exact.logits(tokens_BS), expected_BSV, rtol=1e-3, atol=1e-3)
    # Activations are rounded to 8 bits where the compiled products run.
    found_BSV = kept.logits(tokens_BS)
    assert float((found_BSV - expected_BSV).norm() / expected_BSV.norm()) < 3e-2


def test_groups_that_end_inside_a_word_are_held_dense(tmp_path, caplog):
    """Planes of another project with groups of 16 columns: no kernel takes them, and the model runs all the same."""
    names = [f"model.layers.{number}.self_attn.o_proj" for number in (1, 3)]
    folder = tmp_path / "out"
    shutil.copytree(STORY, folder)
    tensors = load_file(folder / "model.safetensors")
    for seed, name in enumerate(names):
        del tensors[f"{name}.weight"]
        weight = random_binary(plane_layout(rows=128, columns=128, group_size=16), seed=seed)
        alpha_OGP, offset_OG = (tensor * 0.05 for tensor in weight.coefficients.tensors())
        tensors[f"{name}.binary"] = pack_planes(weight.codes_OI, 3)
        tensors[f"{name}.alpha"] = alpha_OGP.permute(1, 2, 0).contiguous()
        tensors[f"{name}.q_bias"] = offset_OG.t().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    with caplog.at_level(logging.INFO, logger="optgptq"):
        kept = load_model(folder, weights="quantized")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (
            "WARNING",
            f"linears that are held dense: 2, {names[0]} first; no kernel multiplies with sign planes whose groups of "
            "16 columns begin inside a word",
        )
    ]
    assert isinstance(kept.layers[1].linears["self_attn.o_proj"], Linear)
    caplog.clear()
    tokens_BS = random_tokens(1, 9, vocab_size=1024)
    with caplog.at_level(logging.INFO, logger="optgptq"):
        decoded = load_model(folder)
    assert torch.equal(kept.logits(tokens_BS), decoded.logits(tokens_BS))
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", f"{len(names)} quantized linears (lut-gemm) are decoded once and held dense in float32")
    ]


def test_words_of_kernels_are_those_of_packing():
    assert packed_binary.COLUMNS_PER_WORD == planes.COLUMNS_PER_WORD


def test_the_kernel_for_sign_planes_is_said_once_and_can_be_replaced(tmp_path, caplog):
    folder, _ = in_planes(tmp_path / "out")
    choice, calls = choose_binary_matmul(torch.device("cpu"), torch.float32), []

    def counting(x, weight, *, bias_O=None):
        calls.append(weight.out_features)
        return choice.call(x, weight, bias_O=bias_O)

    with caplog.at_level(logging.INFO, logger="optgptq"):
        load_model(folder, weights="quantized")
    assert [record.message for record in caplog.records if "kernel" in record.message] == [
        f"{choice.name} kernel for quantized linears: {choice.reason}"
    ]
    load_model(folder, weights="quantized", kernel=counting).logits(random_tokens(1, 3, vocab_size=1024))
    assert len(calls) == 42


def test_a_kernel_that_makes_do_is_a_warning(tmp_path, caplog, monkeypatch):
    folder, _ = in_planes(tmp_path / "out")
    kind = HELD_KINDS[BinaryWeight]
    makeshift = replace(kind.choose(torch.device("cpu"), torch.float32), is_makeshift=True)
    kinds = {BinaryWeight: replace(kind, choose=lambda device, dtype, exact: makeshift)}
    monkeypatch.setattr(load, "HELD_KINDS", kinds)
    load_model(folder, weights="quantized")
    assert [record.levelname for record in caplog.records if "kernel" in record.message] == ["WARNING"]


def test_coefficients_that_are_not_finite_are_refused(tmp_path):
    folder, _ = in_planes(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.bcq_alpha"
    alpha = load_file(folder / "model.safetensors")[name]
    alpha[0, 1, 3] = torch.inf
    change(folder, name, alpha)
    with pytest.raises(FormatError, match=r"mlp\.up_proj"):
        load_model(folder)
