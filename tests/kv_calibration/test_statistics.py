"""Statistics of heads: against loops over tokens in float64."""

from __future__ import annotations

import pytest
import torch
from support.quantizable import padded_windows, tiny_model, write_model
from support.tiny_models import random_tokens

from optgptq.calibration.stream import ActivationStream, embed
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.windows import Windows
from optgptq.errors import NumericalError
from optgptq.kv_cache.scheme import PastRule
from optgptq.kv_calibration.probes import probe_window
from optgptq.kv_calibration.statistics import measure_layer, reader_metrics
from optgptq.models.attention import attention_context
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear
from optgptq.models.loading import load_embedding, load_layer
from optgptq.models.registry import model_spec

PAST = PastRule(mode="token", sink_tokens=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    path = tmp_path_factory.mktemp("llama") / "model"
    return CheckpointFolder.open(write_model(tiny_model("llama-grouped_query"), path))


def stream_of(folder: CheckpointFolder, windows: Windows, *, num_held_out: int = 0) -> ActivationStream:
    spec = model_spec(folder)
    context = attention_context(spec, windows.window_size)
    embedding = load_embedding(folder, spec, dtype=torch.float32)
    return embed(windows, embedding, context, windows_per_batch=2, num_held_out=num_held_out)


def layer_of(folder: CheckpointFolder, index: int = 0) -> DecoderLayer:
    return load_layer(folder, model_spec(folder), index, dtype=torch.float32)


def windows_of(lengths: list[int]) -> Windows:
    return padded_windows(random_tokens(len(lengths), max(lengths), vocab_size=258), lengths)


def heads_of(folder: CheckpointFolder, windows: Windows) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return queries, keys and values of each window in float64, padding cut off."""
    layer, stream = layer_of(folder), stream_of(folder, windows)
    found = []
    for batch in stream.batches:
        inputs_BSM = layer.stage_input("qkv", batch.state, stream.context)
        heads = layer.project_heads(inputs_BSM, stream.context)
        for row in range(len(inputs_BSM)):
            length = int(windows.lengths_W[batch.first_window + row])
            query, key, value = (part[row, :, :length].double() for part in heads)
            found.append((query, key, value))
    return found


def test_means_reservoir_and_maxima_leave_out_padding_sinks_and_held_out_windows(folder: CheckpointFolder) -> None:
    windows = windows_of([9, 11, 7, 11, 11])
    stream = stream_of(folder, windows, num_held_out=2)
    found = measure_layer(stream, layer_of(folder), PAST, reservoir_tokens=10**6, seed=0)
    heads = heads_of(folder, windows)[:3]
    key_KTD, value_KTD = (torch.cat([window[side][:, 2:] for window in heads], 1) for side in (1, 2))
    torch.testing.assert_close(found.key_KTD.double(), key_KTD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.value_KTD.double(), value_KTD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.key_mean_KD.double(), key_KTD.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.value_mean_KD.double(), value_KTD.mean(1), rtol=1e-5, atol=1e-6)
    largest_K = torch.stack([window[1].abs().amax((1, 2)) for window in heads]).amax(0)
    torch.testing.assert_close(found.key_maximum_K.double(), largest_K, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.key_mass_KT.mean(1), torch.ones(2))


def test_the_reservoir_is_spread_and_depends_on_the_seed_alone(folder: CheckpointFolder) -> None:
    windows = windows_of([30, 30, 30])
    first, again, other = (
        measure_layer(stream_of(folder, windows), layer_of(folder), PAST, reservoir_tokens=18, seed=seed).key_KTD
        for seed in (0, 0, 1)
    )
    assert first.shape[1] == 18
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def literal_probes(
    layer: DecoderLayer, heads: tuple[torch.Tensor, ...], reader_NDD: torch.Tensor, past: PastRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the three sums over all positions of a window as queries."""
    query, key, value = heads
    shared, length = layer.spec.num_heads // layer.spec.num_kv_heads, key.shape[1]
    moment = torch.zeros(len(key), key.shape[2], key.shape[2], dtype=torch.float64)
    key_mass, value_mass = (torch.zeros(len(key), length, dtype=torch.float64) for _ in range(2))
    for head in range(len(query)):
        own, reader = head // shared, reader_NDD[head].double()
        for i in range(length):
            q = query[head, i]
            weights = (key[own, : i + 1] @ q * layer.spec.layers[layer.index].attention_scale).softmax(0)
            output = weights @ value[own, : i + 1]
            total = 0.0
            for t in range(past.sink_tokens, past.first_exact(i, i)):
                away = value[own, t] - output
                cost = float(weights[t]) ** 2 * float(away @ reader @ away)
                value_mass[own, t] += weights[t] ** 2
                key_mass[own, t] += cost * float(q @ q)
                total += cost
            moment[own] += total * torch.outer(q, q)
    return moment, key_mass, value_mass


@pytest.mark.parametrize("past", [PAST, PastRule(mode="window", window=5), PastRule(mode="off")], ids=lambda p: p.name)
def test_probes_weigh_queries_and_tokens_by_what_errors_cost(folder: CheckpointFolder, past: PastRule) -> None:
    layer, windows = layer_of(folder), windows_of([17])
    heads = heads_of(folder, windows)[0]
    reader_NDD = reader_metrics(layer, torch.zeros(1))
    found = probe_window(layer, tuple(part.float() for part in heads), reader_NDD, past)  # type: ignore[arg-type]
    moment, key_mass, value_mass = literal_probes(layer, heads, reader_NDD, past)
    torch.testing.assert_close(found.query_KDD.double(), moment, rtol=1e-3, atol=1e-6 * float(moment.abs().max()))
    torch.testing.assert_close(found.key_mass_KS.double(), key_mass, rtol=1e-3, atol=1e-6 * float(key_mass.max()))
    torch.testing.assert_close(found.value_mass_KS.double(), value_mass, rtol=1e-3, atol=1e-6)


def test_readers_are_the_columns_of_the_output_projection(folder: CheckpointFolder) -> None:
    layer = layer_of(folder)
    (name,) = layer.spec.stage("o").linears
    linear, size = layer.linears[name], layer.spec.head_dim
    assert isinstance(linear, Linear)
    layer.linears[name] = Linear(linear.weight_OI, torch.ones(len(linear.weight_OI)))
    found_NDD = reader_metrics(layer, torch.zeros(1))
    for head in range(layer.spec.num_heads):
        columns = linear.weight_OI[:, head * size : (head + 1) * size].double()
        torch.testing.assert_close(found_NDD[head].double(), columns.T @ columns, rtol=1e-4, atol=1e-6)


def test_long_keys_beyond_the_exact_ones_are_reported(folder: CheckpointFolder) -> None:
    windows = windows_of([12, 12, 12])
    stream, layer = stream_of(folder, windows), layer_of(folder)
    for batch in stream.batches:
        batch.state.hidden_BSM[:, 4] = 0
    found = measure_layer(stream, layer, PAST, reservoir_tokens=99, seed=0)
    assert found.sinks == (4,)


def test_numbers_that_are_not_finite_are_refused(folder: CheckpointFolder) -> None:
    windows, layer = windows_of([5]), layer_of(folder, 1)
    stream = stream_of(folder, windows)
    name = layer.spec.stage("qkv").linears[2]
    linear = layer.linears[name]
    assert isinstance(linear, Linear)
    layer.linears[name] = Linear(linear.weight_OI * torch.inf)
    with pytest.raises(NumericalError) as raised:
        measure_layer(stream, layer, PAST, reservoir_tokens=9, seed=0)
    assert "values of decoder layer 1" in str(raised.value)
    assert "NaN or infinity" in str(raised.value)
