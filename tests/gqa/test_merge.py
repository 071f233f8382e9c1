"""Merged attention of one layer: permutations, biases, and moments against literal sums."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.grouped import some_windows
from support.tiny_models import TINY_MODELS
from support.transformed import saved

from optgptq.calibration.stream import ActivationStream, embed
from optgptq.gqa.grouping import adjacent_groups
from optgptq.gqa.heads import read_heads, write_heads
from optgptq.gqa.keys import key_rule
from optgptq.gqa.merge import MergedHeads, merge_heads, query_order
from optgptq.gqa.statistics import Groups, measure_attended, measure_heads
from optgptq.models.attention import attention_context
from optgptq.models.layer import DecoderLayer
from optgptq.models.loading import load_embedding, load_layer
from optgptq.models.registry import config_spec, family_of, model_spec

MODELS = {tiny.name: tiny for tiny in TINY_MODELS}


def one_layer(folder: Path, name: str, *, held_out: int = 0) -> tuple[ActivationStream, DecoderLayer, DecoderLayer]:
    """A stream before the first layer of a model, and the layer twice: with its own spec, and one to be converted."""
    source = saved(MODELS[name], folder)
    spec, windows = model_spec(source), some_windows(6, 12)
    layer = load_layer(source, spec, 0, dtype=torch.float64)
    context = attention_context(spec, windows.window_size, dtype=torch.float64)
    embedding = load_embedding(source, spec, dtype=torch.float64)
    stream = embed(windows, embedding, context, windows_per_batch=4, num_held_out=held_out)
    return stream, layer, layer.copy()


def merged(stream: ActivationStream, layer: DecoderLayer, groups: Groups) -> MergedHeads:
    moments = measure_heads(stream, layer, dtype=torch.float64)
    attended = measure_attended(stream, layer, groups, dtype=torch.float64)
    return merge_heads(read_heads(layer), moments, attended, groups, key_rule(layer.spec, 0))


def converted(layer: DecoderLayer, heads: MergedHeads, folder: Path, num_kv_heads: int) -> DecoderLayer:
    config = json.loads((folder / "config.json").read_text())
    with_kv_heads = family_of(config).with_kv_heads
    assert with_kv_heads is not None
    spec = config_spec(with_kv_heads(config, num_kv_heads))
    return replace(layer, spec=spec, linears={**layer.linears, **write_heads(heads.heads, spec)})


@pytest.mark.parametrize(
    "name", ["llama-grouped_query", "llama-multi_head_biases", "falcon-multi_head_parallel", "phi3-longrope"]
)
def test_heads_that_only_change_places_change_nothing(name: str, tmp_path: Path) -> None:
    stream, layer, copy = one_layer(tmp_path / "model", name)
    count = layer.spec.num_kv_heads
    groups = tuple((head,) for head in reversed(range(count)))
    found = merged(stream, layer, groups)
    assert found.key_error < 1e-12
    assert found.value_error < 1e-12
    new = converted(copy, found, tmp_path / "model", count)
    hidden = stream.batches[0].state.hidden_BSM
    expected = layer.forward(hidden, stream.context)
    torch.testing.assert_close(new.forward(hidden, stream.context), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["mpt-alibi", "falcon-rw_alibi"])
def test_a_change_of_basis_changes_nothing(name: str, tmp_path: Path) -> None:
    stream, layer, copy = one_layer(tmp_path / "model", name)
    count = layer.spec.num_kv_heads
    found = merged(stream, layer, adjacent_groups(count, 1))
    new = converted(copy, found, tmp_path / "model", count)
    assert not torch.allclose(found.heads.key_KDI, read_heads(layer).key_KDI)
    hidden = stream.batches[0].state.hidden_BSM
    expected = layer.forward(hidden, stream.context)
    torch.testing.assert_close(new.forward(hidden, stream.context), expected, rtol=1e-8, atol=1e-8)


def test_biases_go_where_they_cost_nothing(tmp_path: Path) -> None:
    stream, layer, copy = one_layer(tmp_path / "model", "falcon-rw_alibi")
    found = merged(stream, layer, adjacent_groups(6, 2))
    old, new = read_heads(layer), found.heads
    assert new.key_bias_KD is not None
    assert new.value_bias_KD is not None
    assert float(new.key_bias_KD.abs().max()) == 0.0
    assert float(new.value_bias_KD.abs().max()) == 0.0
    assert old.output_bias_M is not None
    # Keys are not merged here, so attention stays and only values are lost: the mean of what attention adds does not.
    kept = replace(
        new,
        query_NDI=old.query_NDI,
        query_bias_ND=old.query_bias_ND,
        key_KDI=old.key_KDI,
        key_bias_KD=old.key_bias_KD,
        value_KDI=new.value_KDI.repeat_interleave(2, 0),
        value_bias_KD=new.value_bias_KD.repeat_interleave(2, 0),
    )
    copy.linears.update(write_heads(kept, layer.spec))
    difference = torch.zeros(layer.spec.hidden_size, dtype=torch.float64)
    size = 0.0
    for batch in stream.batches:
        outputs = []
        for each in (layer, copy):
            state = each.advance("qkv", batch.state, stream.context)
            outputs.append(each.linears["self_attention.dense"](each.stage_input("o", state, stream.context)))
        difference += (outputs[1] - outputs[0]).flatten(0, 1).sum(0)
        size += float((outputs[1] - outputs[0]).abs().sum())
    assert size > 1.0
    assert float(difference.abs().max()) < 1e-9 * size


def test_values_without_an_output_bias_keep_their_own(tmp_path: Path) -> None:
    stream, layer, _ = one_layer(tmp_path / "model", "qwen2-biases")
    new, old = merged(stream, layer, ((0, 1),)).heads, read_heads(layer)
    assert new.output_bias_M is None
    assert old.value_bias_KD is not None
    assert new.value_bias_KD is not None
    assert float(new.value_bias_KD.abs().max()) > 0.01


@pytest.mark.parametrize("name", ["llama-multi_head_biases", "falcon-rw_alibi", "mistral-short_window"])
def test_moments_are_the_literal_ones(name: str, tmp_path: Path) -> None:
    stream, layer, _ = one_layer(tmp_path / "model", name, held_out=2)
    spec, count = layer.spec, layer.spec.num_kv_heads
    groups = ((0, 2, 4), (1, 3, 5)) if count == 6 else ((1, 0),)
    moments = measure_heads(stream, layer, dtype=torch.float64)
    attended = measure_attended(stream, layer, groups, dtype=torch.float64)
    batches = [batch for batch in stream.batches if not batch.held_out]
    inputs = torch.cat([layer.stage_input("qkv", batch.state, stream.context) for batch in batches])
    query, key, value = layer.project_heads(inputs, stream.context)
    tokens = inputs.shape[0] * inputs.shape[1]
    torch.testing.assert_close(moments.key_KDKD, torch.einsum("bksd,bgse->kdge", key, key) / tokens)
    torch.testing.assert_close(moments.query_NDD, torch.einsum("bnsd,bnse->nde", query, query) / tokens)
    torch.testing.assert_close(moments.key_KD, key.mean(dim=(0, 2)))
    shared = spec.num_heads // count
    for index, group in enumerate(groups):
        expected = torch.zeros(len(group) * spec.head_dim, len(group) * spec.head_dim, dtype=torch.float64)
        for head in query_order((group,), spec.num_heads, count):
            stacked = []
            for member in group:
                # All value heads are the member's: each query head weighs it with its own attention.
                alone = value[:, [member] * count]
                stacked.append(stream.context.attend(0, query, key, alone, spec)[:, head])
            rows = torch.cat(stacked, dim=-1).flatten(0, 1)
            expected += rows.T @ rows / tokens / (len(group) * shared)
            mean = attended.mean_NCD[head].flatten()
            torch.testing.assert_close(mean, rows.mean(0))
        torch.testing.assert_close(attended.moment_GCDCD[index].reshape(expected.shape), expected)
