"""Scores of quantizers: nothing for exact ones, the formula for others, and padding counts nothing."""

from __future__ import annotations

import pytest
import torch
from support.quantizable import padded_windows, tiny_model, write_model
from support.tiny_models import random_tokens

from optgptq.calibration.stream import embed
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.windows import Windows
from optgptq.kv_cache.scheme import LayerScheme, PastRule, SideScheme
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.kv_calibration.attend import CacheAttend, LayerQuantizer
from optgptq.kv_calibration.chains import Chains, hidden_of
from optgptq.kv_calibration.divergence import mean_divergence
from optgptq.models.attention import AttentionContext, attention_context
from optgptq.models.decoder import Decoder, load_decoder

CPU = torch.device("cpu")
PAST = PastRule(mode="token")
EXACT = LayerQuantizer(keys=None, values=None)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("llama") / "model"
    write_model(tiny_model("llama-grouped_query", head_dim=8), path)
    return load_decoder(CheckpointFolder.open(path), dtype=torch.float32)


def chains_of(decoder: Decoder, lengths: list[int], *, num_held_out: int) -> tuple[Chains, Windows]:
    windows = padded_windows(random_tokens(len(lengths), max(lengths), vocab_size=258), lengths)
    context = attention_context(decoder.spec, windows.window_size)
    stream = embed(windows, decoder.embedding, context, windows_per_batch=2, num_held_out=num_held_out)
    chains = Chains.start(stream, decoder.layers.__getitem__, num_layers=len(decoder.layers), past=PAST)
    return chains, windows


def plain(decoder: Decoder, *, keys: int = 2, values: int = 2) -> LayerQuantizer:
    scheme = LayerScheme(
        keys=SideScheme(bits=keys, group_size=decoder.spec.head_dim),
        values=SideScheme(bits=values, group_size=decoder.spec.head_dim),
    )
    return LayerQuantizer.of(scheme, LayerParameters(keys=SideParameters(), values=SideParameters()), CPU)


@torch.no_grad()
def test_an_exact_layer_scores_nothing_and_few_bits_more_than_many(decoder: Decoder) -> None:
    chains, _ = chains_of(decoder, [11, 11, 11], num_held_out=2)
    judge = chains.judge()
    assert judge.cross_block(EXACT) < 1e-5
    scores = [judge.cross_block(plain(decoder, keys=bits, values=bits)) for bits in (8, 4, 2)]
    assert 0 < scores[0] < scores[1] < scores[2]
    errors = judge.attention_errors([EXACT, plain(decoder, keys=4, values=4), plain(decoder)])
    assert errors[0] < 1e-5
    assert errors[0] < errors[1] < errors[2]


@torch.no_grad()
def test_the_cross_block_score_is_the_difference_near_and_far(decoder: Decoder) -> None:
    """The chain is quantized in layer 0 already; the reference is the full-precision model."""
    chains, windows = chains_of(decoder, [9, 9, 6, 9], num_held_out=3)
    first, second = plain(decoder, keys=4), plain(decoder, keys=3)
    chains.advance(first, EXACT)
    found = chains.judge().cross_block(second)
    context = attention_context(decoder.spec, windows.window_size)
    sums = {"near": [0.0, 0.0], "far": [0.0, 0.0]}
    for window in range(1, 4):
        length = int(windows.lengths_W[window])
        exact = decoder.embedding.embed(windows.tokens_WS[window : window + 1], context)
        coded = exact
        for index, layer in enumerate(decoder.layers):
            exact = layer.forward(exact, context)
            coded = layer.forward(coded, _context_of(decoder, windows, index, (first, second)))
            if index >= 1:
                place = sums["near" if index == 1 else "far"]
                place[0] += float((coded - exact)[0, :length].double().abs().sum())
                place[1] += float(exact[0, :length].double().abs().sum())
    assert len(decoder.layers) == 3
    assert found == pytest.approx(sum(difference / size for difference, size in sums.values()), rel=1e-4)


def _context_of(
    decoder: Decoder, windows: Windows, index: int, quantizers: tuple[LayerQuantizer, ...]
) -> AttentionContext:
    layers = dict(enumerate(quantizers))
    return attention_context(decoder.spec, windows.window_size, attend=CacheAttend(layers=layers, past=PAST))


@torch.no_grad()
def test_the_divergence_is_that_of_the_distributions(decoder: Decoder) -> None:
    chains, windows = chains_of(decoder, [8, 8, 5], num_held_out=2)
    for _ in decoder.layers:
        chains.advance(plain(decoder), plain(decoder, keys=3))
    valid = [batch.valid_BS for batch in chains.held_out]
    found = mean_divergence(decoder.head, hidden_of(chains.ahead[0]), hidden_of(chains.plain), valid)
    total = count = 0.0
    for window in (1, 2):
        tokens_BS = windows.tokens_WS[window : window + 1, : int(windows.lengths_W[window])]
        context = attention_context(decoder.spec, tokens_BS.shape[1], attend=_plain_attend(decoder))
        before = decoder.logits(tokens_BS).double().log_softmax(-1)
        after = decoder.logits(tokens_BS, context).double().log_softmax(-1)
        total += float((before.exp() * (before - after)).sum())
        count += tokens_BS.shape[1]
    assert found == pytest.approx(total / count, rel=1e-3)
    same = (hidden_of(chains.ahead[0]) for _ in range(2))
    assert mean_divergence(decoder.head, *same, valid) == 0


def _plain_attend(decoder: Decoder) -> CacheAttend:
    quantizer = plain(decoder, keys=3)
    return CacheAttend(layers=dict.fromkeys(range(len(decoder.layers)), quantizer), past=PAST)
