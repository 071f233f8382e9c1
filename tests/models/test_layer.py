"""The staged walk through a decoder layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import TINY_MODELS, TinyModel, random_tokens, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.models.decoder import Decoder, load_decoder
from optgptq.models.inventory import layer_linears
from optgptq.models.layer import LayerState
from optgptq.models.linear import Linear
from optgptq.models.spec import STAGE_NAMES

# One variant of every way to order norms, residuals and fused projections.
WALKED = {
    "llama-grouped_query",
    "gemma2-softcaps",
    "gemma3text-local_global",
    "phi3-longrope",
    "gpt2-conv1d",
    "gptneox-parallel",
    "opt-post_norm_projected",
    "bloom-residual_after_norm",
    "mpt-six_heads_clipped",
    "falcon-multi_query",
    "falcon-grouped",
    "falcon-rw_alibi",
}


@pytest.fixture(params=[tiny for tiny in TINY_MODELS if tiny.name in WALKED], ids=lambda tiny: tiny.name)
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    tiny: TinyModel = request.param
    return load_decoder(CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path / "model")))


def test_every_walked_variant_exists() -> None:
    assert {tiny.name for tiny in TINY_MODELS} >= WALKED


def test_staged_walk_equals_forward_and_every_linear_reads_its_stage_input(decoder: Decoder) -> None:
    tokens_BS = random_tokens(2, 13)
    context = decoder.context(13)
    hidden = decoder.embedding.embed(tokens_BS, context)
    for layer in decoder.layers:
        before = hidden.clone()
        expected = layer.forward(hidden, context)
        assert torch.equal(hidden, before), "forward wrote into its input"
        read: dict[str, torch.Tensor] = {}
        for name, linear in layer.linears.items():
            assert isinstance(linear, Linear)
            layer.linears[name] = _recording(name, linear, read)
        state = LayerState(hidden_BSM=hidden)
        inputs = {}
        for stage in STAGE_NAMES:
            inputs[stage] = layer.stage_input(stage, state, context).clone()
            state = layer.advance(stage, state, context)
        assert torch.equal(state.hidden_BSM, expected)
        assert state.heads_BSI is None
        assert state.attention_BSM is None
        for info in layer_linears(decoder.spec, layer.index):
            assert torch.equal(read[info.local_name], inputs[info.stage]), info.name
            assert inputs[info.stage].shape == (2, 13, info.in_features)
        hidden = expected


def test_advance_takes_the_stage_input_that_was_already_made(decoder: Decoder) -> None:
    tokens_BS = random_tokens(1, 7)
    context = decoder.context(7)
    layer = decoder.layers[0]
    state = LayerState(hidden_BSM=decoder.embedding.embed(tokens_BS, context))
    expected = layer.forward(state.hidden_BSM, context)
    for stage in STAGE_NAMES:
        inputs = layer.stage_input(stage, state, context)
        kept = inputs.clone()
        state = layer.advance(stage, state, context, stage_input_BSI=inputs)
        assert torch.equal(inputs, kept), f"advance({stage}) wrote into its input"
    assert torch.equal(state.hidden_BSM, expected)


def test_a_copy_shares_weights_but_not_the_choice_of_linears(decoder: Decoder) -> None:
    layer = decoder.layers[0]
    copy = layer.copy()
    (name,) = decoder.spec.stage("down").linears
    original = layer.linears[name]
    assert copy.linears[name] is original
    copy.linears[name] = Linear(torch.zeros(decoder.spec.hidden_size, decoder.spec.intermediate_size))
    assert layer.linears[name] is original


def test_stage_o_needs_the_state_after_qkv(decoder: Decoder) -> None:
    state = LayerState(hidden_BSM=torch.zeros(1, 2, decoder.spec.hidden_size))
    with pytest.raises(ValueError, match="stage qkv"):
        decoder.layers[0].stage_input("o", state, decoder.context(2))


def test_right_padding_does_not_change_the_positions_before_it(decoder: Decoder) -> None:
    tokens_BS = random_tokens(1, 12)
    padded = torch.cat([tokens_BS, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    # Same context length, so that rotary tables that depend on the length are the same.
    whole = decoder.logits(torch.cat([tokens_BS, random_tokens(1, 5, seed=9)], dim=1))
    torch.testing.assert_close(decoder.logits(padded)[:, :12], whole[:, :12], rtol=0, atol=1e-4)


def _recording(name: str, linear: Linear, read: dict[str, torch.Tensor]) -> Linear:
    class Recording(Linear):
        def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
            read[name] = x.clone()
            return linear(x)

    return Recording(linear.weight_OI, linear.bias_O)
