"""Row factors through the softmax against finite differences and loops over pairs, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.attention_layers import (
    ROPE,
    attention_layer,
    changed,
    literal_rotation,
    literal_weights,
    random_inputs,
)
from support.attention_moments import KEY, QUERY, context_of, heads_of

from optgptq.calibration.attention_inputs import AttentionInputs
from optgptq.calibration.softmax_rows import SoftmaxRowMoments, SoftmaxRowSettings
from optgptq.models.attention import self_attention
from optgptq.models.layer import DecoderLayer
from optgptq.models.spec import RopeSpec


def collector(layer: DecoderLayer, output_OI: torch.Tensor | None = None, *, number: int = 99) -> SoftmaxRowMoments:
    settings = SoftmaxRowSettings(positions_per_window=number, dtype=torch.float64)
    return SoftmaxRowMoments(layer, settings, output_weight_OI=output_OI, num_positions=7)


def output_weight() -> torch.Tensor:
    return torch.randn(8, 30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def rotation(rope: RopeSpec | None, position: int) -> torch.Tensor:
    if rope is None:
        return torch.eye(5, dtype=torch.float64)
    return literal_rotation(rope, position, num_positions=7, head_dim=5)


VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "plain": {"rope": None},
    "alibi": {"rope": None, "alibi": True},
    "window": {"window": 3},
    "softcap": {"softcap": 0.8},
    "norms": {"norms": True},
}


def shifted(layer: DecoderLayer, heads: AttentionInputs, part: str, step_D: torch.Tensor) -> torch.Tensor:
    """Return query or key heads whose projection is moved by `step_D`, before norm and rotation."""
    rope = layer.spec.layers[0].rope
    norm = layer.norms.query if part == "query" else layer.norms.key
    found_BHSD = heads.query_BNSD if part == "query" else heads.key_BKSD
    raw_BHSD = heads.raw_query_BNSD if part == "query" else heads.raw_key_BKSD
    moved_BHSD = found_BHSD.clone()
    for position in range(found_BHSD.shape[2]):
        if norm is None or raw_BHSD is None:
            moved_BHSD[:, :, position] += rotation(rope, position) @ step_D
        else:
            normed = norm(raw_BHSD[:, :, position] + step_D)
            moved_BHSD[:, :, position] = normed @ rotation(rope, position).T
    return moved_BHSD


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_query_factor_predicts_small_changes_of_the_output(variant: str, num_kv_heads: int) -> None:
    layer = attention_layer(num_kv_heads=num_kv_heads, **VARIANTS[variant])
    output_OND = output_weight().view(8, 6, 5)
    heads = heads_of(layer, random_inputs(1, 7))
    moments = collector(layer, output_weight())
    moments.add(heads)
    step_D = 1e-3 * torch.tensor([0.3, -1.0, 0.7, 0.2, 1.1], dtype=torch.float64)
    outputs = [
        self_attention(0, shifted(layer, heads, "query", sign * step_D), heads.key_BKSD, heads.value_BKSD, layer.spec)
        for sign in (1, -1)
    ]
    moved_NSD = ((outputs[0] - outputs[1]) / 2)[0]
    for head, factor_DD in enumerate(moments.query_output_moments()):
        measured = float((moved_NSD[head] @ output_OND[:, head].T).square().sum()) / 7
        assert float(step_D @ factor_DD @ step_D) == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_key_factor_predicts_small_changes_of_one_key_after_the_other(variant: str, num_kv_heads: int) -> None:
    layer = attention_layer(num_kv_heads=num_kv_heads, **VARIANTS[variant])
    heads = heads_of(layer, random_inputs(1, 7))
    moments = collector(layer, output_weight())
    moments.add(heads)
    step_D = 1e-3 * torch.tensor([0.3, -1.0, 0.7, 0.2, 1.1], dtype=torch.float64)
    moved = [shifted(layer, heads, "key", sign * step_D) for sign in (1, -1)]
    measured_N = torch.zeros(6, dtype=torch.float64)
    for position in range(7):
        outputs = []
        for moved_BKSD in moved:
            key_BKSD = heads.key_BKSD.clone()
            key_BKSD[:, :, position] = moved_BKSD[:, :, position]
            outputs.append(self_attention(0, heads.query_BNSD, key_BKSD, heads.value_BKSD, layer.spec))
        change_NSD = ((outputs[0] - outputs[1]) / 2)[0]
        priced_NSO = torch.einsum("nsd,ond->nso", change_NSD, output_weight().view(8, 6, 5))
        measured_N += priced_NSO.square().sum(dim=(1, 2)) / 7
    for kv_head, factor_DD in enumerate(moments.key_output_moments()):
        measured = float(measured_N.view(num_kv_heads, -1)[kv_head].sum())
        assert float(step_D @ factor_DD @ step_D) == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("rope", [None, ROPE])
@pytest.mark.parametrize("num_kv_heads", [1, 3, 6])
@pytest.mark.parametrize("priced", [False, True])
def test_factors_are_sums_over_queries_and_pairs(rope: RopeSpec | None, num_kv_heads: int, priced: bool) -> None:
    layer = attention_layer(num_kv_heads=num_kv_heads, rope=rope)
    inputs_BSI, output_OI = random_inputs(2, 7), output_weight() if priced else None
    heads = heads_of(layer, inputs_BSI)
    moments = collector(layer, output_OI)
    moments.add(heads)
    scale, group = layer.spec.layers[0].attention_scale, 6 // num_kv_heads
    query_NDD = torch.zeros(6, 5, 5, dtype=torch.float64)
    key_KDD = torch.zeros(num_kv_heads, 5, 5, dtype=torch.float64)
    for batch in range(2):
        for head in range(6):
            kv_head = head // group
            queries, keys = heads.query_BNSD[batch, head], heads.key_BKSD[batch, kv_head]
            values = heads.value_BKSD[batch, kv_head]
            project_OD = torch.eye(5, dtype=torch.float64) if output_OI is None else output_OI.view(8, 6, 5)[:, head]
            weights_SS = literal_weights(layer, queries, keys, head)
            for position in range(7):
                output_D = weights_SS[position] @ values
                total_OD = torch.zeros(len(project_OD), 5, dtype=torch.float64)
                for key in range(position + 1):
                    moved_O = scale * weights_SS[position, key] * project_OD @ (values[key] - output_D)
                    total_OD += torch.outer(moved_O, keys[key])
                    turned_D = rotation(rope, key).T @ queries[position]
                    key_KDD[kv_head] += moved_O.square().sum() * torch.outer(turned_D, turned_D) / 14
                turned_OD = total_OD @ rotation(rope, position)
                query_NDD[head] += turned_OD.T @ turned_OD / 14
    assert moments.num_tokens == 14
    torch.testing.assert_close(moments.query_output_moments(), query_NDD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.key_output_moments(), key_KDD, rtol=1e-5, atol=1e-6)


def test_windows_stream_merge_and_are_cut_at_padding() -> None:
    layer, inputs_BSI = attention_layer(), random_inputs(3, 7)
    valid_BS = torch.arange(7) < torch.tensor([7, 4, 0])[:, None]
    heads = heads_of(layer, inputs_BSI)
    whole, first, second = (collector(layer, number=3) for _ in range(3))
    whole.add(heads, valid_BS)
    first.add(heads_of(layer, inputs_BSI[:1]))
    second.add(heads_of(layer, inputs_BSI[1:2, :4]), first_window=1)
    first.merge(second)
    assert whole.num_tokens == first.num_tokens == 6
    torch.testing.assert_close(first.query_output_moments(), whole.query_output_moments(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first.key_output_moments(), whole.key_output_moments(), rtol=1e-10, atol=1e-12)
    assert whole.is_finite()


def test_chunks_of_positions_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = attention_layer(norms=True)
    heads = heads_of(layer, random_inputs(2, 7))
    whole, chunked = collector(layer), collector(layer)
    whole.add(heads)
    monkeypatch.setattr("optgptq.calibration.softmax_rows._NUMBERS_PER_CHUNK", 2 * 7 * 5)
    chunked.add(heads)
    torch.testing.assert_close(chunked.query_output_moments(), whole.query_output_moments(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(chunked.key_output_moments(), whole.key_output_moments(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [QUERY, KEY])
def test_the_factor_ranks_changes_as_the_output_of_attention_does(name: str) -> None:
    """Changes of one head that differ in the direction of their rows only."""
    layer = attention_layer(num_kv_heads=6, weight_scale=0.4)
    inputs_BSI, context = random_inputs(8, 12), context_of(layer, 12)
    moments = SoftmaxRowMoments(
        layer, SoftmaxRowSettings(dtype=torch.float64), output_weight_OI=output_weight(), num_positions=12
    )
    moments.add(heads_of(layer, inputs_BSI))
    factors_NDD = moments.query_output_moments() if name == QUERY else moments.key_output_moments()
    before_BNSD = context.attend(0, *layer.project_heads(inputs_BSI, context), layer.spec)
    generator = torch.Generator().manual_seed(7)
    inputs_I = torch.randn(10, generator=generator, dtype=torch.float64)
    correlations = []
    for head in range(6):
        priced, measured = [], []
        for _ in range(20):
            direction_D = torch.randn(5, generator=generator, dtype=torch.float64)
            direction_D *= 1e-3 / direction_D.norm()
            step_NDI = torch.zeros(6, 5, 10, dtype=torch.float64)
            step_NDI[head] = torch.outer(direction_D, inputs_I)
            other = changed(layer, name, step_NDI.flatten(0, 1))
            after_BNSD = context.attend(0, *other.project_heads(inputs_BSI, context), layer.spec)
            moved_BSO = (after_BNSD - before_BNSD)[:, head] @ output_weight().view(8, 6, 5)[:, head].T
            measured.append(float(moved_BSO.square().sum()))
            priced.append(float(direction_D @ factors_NDD[head] @ direction_D))
        ranks = torch.tensor([priced, measured]).argsort(dim=1).argsort(dim=1).double()
        correlations.append(float(torch.corrcoef(ranks)[0, 1]))
    assert sum(correlations) / 6 > 0.4
