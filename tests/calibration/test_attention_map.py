"""Written-out attention weights against the attention of every family, and the check that they are causal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.attention_layers import attention_layer, literal_weights, random_inputs
from support.tiny_models import TINY_MODELS, TinyModel, random_tokens, reference_model, save_reference
from torch.nn import functional as F  # noqa: N812

from optgptq.calibration.attention_inputs import attention_inputs
from optgptq.calibration.attention_map import attention_weights, check_attention, check_causal
from optgptq.calibration.attention_moments import AttentionMoments, AttentionMomentSettings
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import NumericalError
from optgptq.models.attention import AttentionContext, attention_context
from optgptq.models.decoder import load_decoder
from optgptq.models.layer import LayerState
from optgptq.models.spec import DecoderSpec

# One variant of every kind of attention.
KINDS = {
    "llama-grouped_query",
    "llama-rope_yarn_scales",
    "mistral-short_window",
    "qwen3-norms",
    "gemma2-softcaps",
    "gemma3text-local_global",
    "phi3-longrope",
    "gpt2-inverse_layer",
    "gptneox-parallel",
    "bloom-alibi",
    "mpt-six_heads_clipped",
    "falcon-multi_query_alibi",
    "falcon-grouped",
}


@pytest.mark.parametrize("tiny", [tiny for tiny in TINY_MODELS if tiny.name in KINDS], ids=lambda tiny: tiny.name)
def test_weights_give_the_attention_of_every_family(tiny: TinyModel, tmp_path: Path) -> None:
    decoder = load_decoder(CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path / "model")))
    context = decoder.context(13)
    state = LayerState(hidden_BSM=decoder.embedding.embed(random_tokens(2, 13), context))
    for layer in decoder.layers:
        inputs_BSM = layer.stage_input("qkv", state, context)
        check_attention(layer, inputs_BSM, context)
        heads = attention_inputs(layer, inputs_BSM, context)
        assert (heads.raw_query_BNSD is not None) == (layer.norms.query is not None)
        if heads.raw_query_BNSD is not None and layer.norms.query is not None:
            # Position 0 is not rotated.
            normed = layer.norms.query(heads.raw_query_BNSD)[:, :, 0]
            torch.testing.assert_close(normed, heads.query_BNSD[:, :, 0], rtol=1e-5, atol=1e-6)
        settings = AttentionMomentSettings(value_heads=range(decoder.spec.num_kv_heads), norm_tokens=3)
        moments = AttentionMoments(layer, settings, num_positions=13)
        moments.add(heads)
        assert moments.is_finite()
        for factor_DD in (*moments.query_output_moments(), *moments.key_output_moments()):
            values = torch.linalg.eigvalsh(factor_DD)
            assert float(values.min()) > -1e-5 * float(values.max())
        state = LayerState(hidden_BSM=layer.forward(state.hidden_BSM, context))


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("alibi", [False, True])
def test_any_positions_of_any_heads_are_rows_of_the_whole_map(window: int | None, alibi: bool) -> None:
    layer = attention_layer(window=window, alibi=alibi)
    heads = attention_inputs(layer, random_inputs(1, 9), attention_context(layer.spec, 9, dtype=torch.float64))
    positions_S = torch.tensor([0, 2, 6])
    found = attention_weights(
        heads.query_BNSD[0, 3:6, positions_S],
        heads.key_BKSD[0, 1, :7],
        positions_S,
        spec=layer.spec,
        layer_index=0,
        first_head=3,
    )
    check_causal(found, positions_S, where="here")
    for slot, head in enumerate((3, 4, 5)):
        expected = literal_weights(layer, heads.query_BNSD[0, head], heads.key_BKSD[0, 1], head)
        torch.testing.assert_close(found[slot], expected[positions_S, :7], rtol=1e-5, atol=1e-8)


def test_causal_weights_pass_and_others_are_named() -> None:
    positions_S = torch.arange(5)
    scores = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    causal = torch.softmax(scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")), dim=-1)
    check_causal(causal, positions_S, where="layer 3")
    check_causal(causal[:, 2:4], positions_S[2:4], where="layer 3")
    leaking = causal.clone()
    leaking[1, 0, 4] = 1e-12
    with pytest.raises(NumericalError) as raised:
        check_causal(leaking, positions_S, where="layer 3")
    assert raised.value.where == "layer 3"
    assert raised.value.expected == "causal attention: no weight on later positions"
    assert raised.value.found == "a weight of 1e-12 on a later position"
    for broken in (causal * 0.9, causal * float("nan"), causal.index_fill(2, torch.tensor([0]), -0.5)):
        with pytest.raises(NumericalError, match="sum to 1"):
            check_causal(broken, positions_S, where="layer 3")


def _bidirectional(
    layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: DecoderSpec, /
) -> torch.Tensor:
    del layer_index, spec
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def test_a_model_whose_attention_sees_later_keys_is_refused() -> None:
    layer = attention_layer()
    context: AttentionContext = attention_context(layer.spec, 8, dtype=torch.float64)
    check_attention(layer, random_inputs(2, 8), context)
    with pytest.raises(NumericalError) as raised:
        check_attention(layer, random_inputs(2, 8), replace(context, attend=_bidirectional))
    assert raised.value.where == "attention of decoder layer 0"
    assert raised.value.expected == "the output of causal softmax attention, within 0.0001 of its size"
    assert raised.value.found.startswith("a difference of ")


def test_activations_that_are_not_finite_are_refused() -> None:
    layer = attention_layer()
    context = attention_context(layer.spec, 4, dtype=torch.float64)
    inputs_BSM = random_inputs(1, 4)
    inputs_BSM[0, 1, 1] = float("nan")
    moments = AttentionMoments(layer, AttentionMomentSettings(value_heads=range(1)), num_positions=4)
    with pytest.raises(NumericalError, match="sums that differ from 1 by up to nan"):
        moments.add(attention_inputs(layer, inputs_BSM, context))
