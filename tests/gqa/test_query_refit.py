"""The refit of query projections against literal sums over pairs of tokens and a literal least squares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.grouped import some_windows
from support.tiny_models import TINY_MODELS
from support.transformed import saved

from optgptq.calibration.stream import ActivationStream, embed
from optgptq.gqa.grouping import adjacent_groups
from optgptq.gqa.heads import HeadWeights, read_heads, write_heads
from optgptq.gqa.query_refit import refit_queries
from optgptq.gqa.score_form import ScoreForm
from optgptq.models.attention import attention_context
from optgptq.models.layer import DecoderLayer
from optgptq.models.loading import load_embedding, load_layer
from optgptq.models.registry import model_spec


def random_form(count: int, size: int, features: int, seed: int) -> ScoreForm:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    roots = normal(count, size, size + 1)
    metric, query, feature = roots @ roots.mT, normal(count, size), normal(count, features)
    return ScoreForm(
        metric_TDD=metric, target_TD=normal(count, size), variance=50.0, feature_TI=feature, query_TD=query
    )


@pytest.mark.parametrize(("count", "size", "features"), [(40, 3, 4), (30, 4, 2), (25, 2, 5)])
def test_the_change_is_the_literal_least_squares(count: int, size: int, features: int) -> None:
    form = random_form(count, size, features, seed=count)
    change = form.solve()
    normal = torch.zeros(size * features, size * features, dtype=torch.float64)
    wanted = torch.zeros(size * features, dtype=torch.float64)
    for token in range(count):
        metric, feature = form.metric_TDD[token], form.feature_TI[token]
        normal += torch.kron(metric, torch.outer(feature, feature))
        lacking = form.target_TD[token] - metric @ form.query_TD[token]
        wanted += torch.outer(lacking, feature).flatten()
    expected = torch.linalg.solve(normal, wanted).view(size, features)
    # The ridge is a thousandth.
    torch.testing.assert_close(change, expected, rtol=0.05, atol=5e-3 * float(expected.abs().max()))
    assert form.error(change) < form.error()


def one_layer(folder: Path, name: str) -> tuple[ActivationStream, DecoderLayer]:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == name)
    source = saved(tiny, folder)
    spec, windows = model_spec(source), some_windows()
    layer = load_layer(source, spec, 0, dtype=torch.float64)
    context = attention_context(spec, windows.window_size, dtype=torch.float64)
    embedding = load_embedding(source, spec, dtype=torch.float64)
    return embed(windows, embedding, context, windows_per_batch=5, num_held_out=2), layer


def disturbed(layer: DecoderLayer, strength: float) -> tuple[DecoderLayer, HeadWeights]:
    """A layer with the same heads whose queries are off: each head of its own group, none is merged."""
    heads = read_heads(layer)
    noise = torch.randn(heads.query_NDI.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Changes that the group's own queries can make up for.
    mixed = heads.query_NDI + strength * noise[:, :, : heads.query_NDI.shape[1]] @ heads.query_NDI
    changed = replace(heads, query_NDI=mixed)
    return replace(layer, linears={**layer.linears, **write_heads(changed, layer.spec)}), changed


def literal_error(stream: ActivationStream, layers: tuple[DecoderLayer, DecoderLayer]) -> tuple[float, float]:
    """Weighted score error and variance on held-out windows, token by token, for models without masks but causal."""
    spec = layers[1].spec
    error = variance = 0.0
    batch = next(batch for batch in stream.batches if batch.held_out)
    new, old = (
        layer.project_heads(layer.stage_input("qkv", batch.state, stream.context), stream.context) for layer in layers
    )
    shared = spec.num_heads // spec.num_kv_heads
    slopes = spec.alibi.slopes if spec.alibi is not None else (0.0,) * spec.num_heads
    scale = spec.layers[0].attention_scale
    for window in range(new[0].shape[0]):
        for head in range(spec.num_heads):
            for position in range(new[0].shape[2]):
                scores = [
                    each[1][window, head // shared, : position + 1] @ each[0][window, head, position]
                    for each in (new, old)
                ]
                bias = slopes[head] * torch.arange(position + 1)
                weights = torch.softmax(scores[1] * scale + bias, dim=0)
                difference = scores[0] - scores[1]
                error += float((weights * (difference - weights @ difference).square()).sum())
                variance += float((weights * (scores[1] - weights @ scores[1]).square()).sum())
    return error, variance


@pytest.mark.parametrize("name", ["llama-multi_head_biases", "mpt-alibi", "llama-grouped_query"])
def test_disturbed_queries_are_found_again(name: str, tmp_path: Path) -> None:
    stream, layer = one_layer(tmp_path / "model", name)
    changed, new = disturbed(layer, 0.1)
    groups = adjacent_groups(layer.spec.num_kv_heads, 1)
    refit = refit_queries(stream, (changed, layer), (new, read_heads(layer)), groups)
    error, variance = literal_error(stream, (changed, layer))
    assert refit.error_before == pytest.approx(error / variance, rel=1e-6)
    assert refit.num_accepted == layer.spec.num_heads
    assert refit.error_after < 0.05 * refit.error_before
    fitted = replace(changed, linears={**changed.linears, **write_heads(refit.heads, layer.spec)})
    error, variance = literal_error(stream, (fitted, layer))
    assert refit.error_after == pytest.approx(error / variance, rel=1e-6)


def test_queries_that_are_right_stay(tmp_path: Path) -> None:
    stream, layer = one_layer(tmp_path / "model", "gemma2-softcaps")
    heads = read_heads(layer)
    refit = refit_queries(stream, (layer, layer), (heads, heads), adjacent_groups(layer.spec.num_kv_heads, 1))
    assert refit.error_before == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(refit.heads.query_NDI, heads.query_NDI, rtol=1e-6, atol=1e-8)


def test_few_queries_are_chosen_where_heads_are_wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, layer = one_layer(tmp_path / "model", "llama-grouped_query")
    changed, new = disturbed(layer, 0.1)
    groups = adjacent_groups(layer.spec.num_kv_heads, 1)
    monkeypatch.setattr("optgptq.gqa.query_refit._METRIC_NUMBERS", 50 * layer.spec.head_dim**2)
    refit = refit_queries(stream, (changed, layer), (new, read_heads(layer)), groups)
    assert refit.error_after < 0.2 * refit.error_before
