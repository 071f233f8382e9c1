"""Joined linears give what the separate ones give; what is held otherwise stays apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.binary_weights import plane_layout, random_binary
from support.checkpoints import random_weight
from support.quantizable import wide_llama
from support.tiny_models import TINY_MODELS, random_tokens, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.kernels.binary import binary_matmul
from optgptq.kernels.reference import affine_matmul
from optgptq.layout import LinearLayout
from optgptq.models.decoder import Decoder, load_decoder
from optgptq.models.linear import Linear
from optgptq.runtime.fused_linears import FUSED_GATE_UP, FUSED_QKV, fuse_linears
from optgptq.runtime.linear import QuantLinear, pack_binary

SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
TOKENS = random_tokens(2, 9)


@pytest.fixture
def wide(tmp_path: Path) -> Decoder:
    model = reference_model(wide_llama(vocab_size=61))
    return load_decoder(CheckpointFolder.open(save_reference(model, tmp_path)))


def quantized(linear: Linear, kind: str, *, bits: int = 4, bias: bool = False, seed: int = 0) -> QuantLinear:
    rows, columns = linear.weight_OI.shape
    generator = torch.Generator().manual_seed(seed)
    bias_O = torch.randn(rows, generator=generator) if bias else None
    if kind == "binary":
        layout = plane_layout(rows=rows, columns=columns, bits=bits, group_size=-1)
        return QuantLinear(weight=pack_binary(random_binary(layout, seed=seed)), bias_O=bias_O, kernel=binary_matmul)
    layout = LinearLayout(
        name="it", out_features=rows, in_features=columns, bits=bits, group_size=16, symmetric=kind == "symmetric"
    )
    return QuantLinear(weight=random_weight(layout, seed=seed), bias_O=bias_O, kernel=affine_matmul)


def check(decoder: Decoder, *, joined: tuple[str, ...]) -> Decoder:
    """Fuse and compare; return the fused model."""
    expected = decoder.logits(TOKENS)
    fused = fuse_linears(decoder)
    for layer in fused.layers:
        assert {name for name in layer.linears if name.startswith("fused")} == set(joined)
        assert not any(name in layer.linears for name in SEPARATE) or joined != (FUSED_QKV, FUSED_GATE_UP)
    assert all(layer is other for layer, other in zip(fused.layers, decoder.layers, strict=True))
    torch.testing.assert_close(fused.logits(TOKENS), expected, rtol=1e-4, atol=1e-4)
    return fused


@pytest.mark.parametrize(
    "name", ["llama-multi_head_biases", "qwen2-biases", "gemma3text-local_global", "mistral-no_window"]
)
def test_dense_linears(name: str, tmp_path: Path) -> None:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == name)
    decoder = load_decoder(CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path)))
    fused = check(decoder, joined=(FUSED_QKV, FUSED_GATE_UP))
    again = fuse_linears(fused)
    assert [list(layer.linears) for layer in again.layers] == [list(layer.linears) for layer in fused.layers]


@pytest.mark.parametrize("name", ["gpt2-conv1d", "falcon-grouped", "gptneox-parallel", "opt-pre_norm"])
def test_models_whose_linears_are_one_already_or_have_no_gate(name: str, tmp_path: Path) -> None:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == name)
    decoder = load_decoder(CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path)))
    check(decoder, joined=(FUSED_QKV,) if name.startswith("opt") else ())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "binary"])
def test_quantized_linears(wide: Decoder, kind: str, bias: bool) -> None:
    for layer in wide.layers:
        for seed, name in enumerate(SEPARATE):
            # One of three has a bias: the others get zeros.
            layer.linears[name] = quantized(layer.linears[name], kind, bias=bias and seed % 3 == 1, seed=seed)
    fused = check(wide, joined=(FUSED_QKV, FUSED_GATE_UP))
    joined = fused.layers[0].linears[FUSED_QKV]
    assert isinstance(joined, QuantLinear)
    assert joined.weight.out_features == 48 + 2 * 24
    assert (joined.bias_O is not None) == bias


def test_different_widths_kinds_and_kernels_stay_apart(wide: Decoder) -> None:
    def other_kernel(x, weight, *, bias_O=None):
        return affine_matmul(x, weight, bias_O=bias_O)

    for layer in wide.layers:
        linears = layer.linears
        linears[SEPARATE[0]] = quantized(linears[SEPARATE[0]], "symmetric", bits=8)
        for name in SEPARATE[1:3]:
            linears[name] = quantized(linears[name], "symmetric")
        linears[SEPARATE[3]] = quantized(linears[SEPARATE[3]], "symmetric")
    check(wide, joined=())
    for layer in wide.layers:
        linears = layer.linears
        linears[SEPARATE[0]] = QuantLinear(
            weight=quantized(Linear(torch.zeros(48, 48)), "symmetric").weight, bias_O=None, kernel=other_kernel
        )
        linears[SEPARATE[4]] = quantized(Linear(torch.zeros(96, 48)), "binary")
    check(wide, joined=())
