"""Row factors of queries and keys against loops over tokens in float64, and what all sums have in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.attention_layers import ROPE, attention_layer, changed, literal_rotation, random_inputs
from support.attention_moments import (
    FLOAT64,
    KEY,
    QUERY,
    all_heads,
    change,
    collected,
    context_of,
    heads_of,
    two_sided,
)

from optgptq.calibration.attention_inputs import AttentionInputs
from optgptq.calibration.attention_moments import AttentionMoments, bytes_needed
from optgptq.models.spec import RopeSpec


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6])
def test_query_factor_prices_every_score_of_a_sequence(num_kv_heads: int) -> None:
    layer = attention_layer(num_kv_heads=num_kv_heads, rope=None)
    inputs_BSI = random_inputs(1, 7)
    heads = heads_of(layer, inputs_BSI)
    moments_NDD = collected(layer, inputs_BSI).query_output_moments()
    change_NDI = change(layer, QUERY).view(6, 5, 10)
    input_II = inputs_BSI[0].T @ inputs_BSI[0] / 7
    for head in range(6):
        change_SD = inputs_BSI[0] @ change_NDI[head].T
        scores_SS = change_SD @ heads.key_BKSD[0, head // (6 // num_kv_heads)].T
        expected = float(scores_SS.square().sum()) / 49
        assert two_sided(moments_NDD[head], change_NDI[head], input_II) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6])
def test_key_factor_prices_every_score_of_the_heads_that_share_it(num_kv_heads: int) -> None:
    layer = attention_layer(num_kv_heads=num_kv_heads, rope=None)
    inputs_BSI = random_inputs(1, 7)
    heads = heads_of(layer, inputs_BSI)
    moments_KDD = collected(layer, inputs_BSI).key_output_moments()
    change_KDI = change(layer, KEY).view(num_kv_heads, 5, 10)
    input_II = inputs_BSI[0].T @ inputs_BSI[0] / 7
    group = 6 // num_kv_heads
    for kv_head in range(num_kv_heads):
        change_SD = inputs_BSI[0] @ change_KDI[kv_head].T
        expected = 0.0
        for head in range(kv_head * group, (kv_head + 1) * group):
            expected += float((heads.query_BNSD[0, head] @ change_SD.T).square().sum()) / 49 / group
        assert two_sided(moments_KDD[kv_head], change_KDI[kv_head], input_II) == pytest.approx(expected, rel=1e-10)


ROPES = (
    ROPE,
    replace(ROPE, rotary_dim=2),
    replace(ROPE, kind="yarn", factor=4.0, original_max_position=64, attention_factor=1.2),
    replace(ROPE, kind="dynamic", factor=3.0, max_position=4),
)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope.kind}-{rope.rotary_dim}")
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_row_factors_are_means_over_tokens_of_both_sides(rope: RopeSpec, num_kv_heads: int) -> None:
    layer = attention_layer(num_kv_heads=num_kv_heads, rope=rope)
    inputs_BSI = random_inputs(2, 6)
    heads = heads_of(layer, inputs_BSI)
    moments = collected(layer, inputs_BSI)
    rotations = [literal_rotation(rope, position, num_positions=6, head_dim=5) for position in range(6)]
    group = 6 // num_kv_heads

    def literal(tokens_TD: torch.Tensor) -> torch.Tensor:
        total_DD = torch.zeros(5, 5, dtype=torch.float64)
        for rotation in rotations:
            for token_D in tokens_TD:
                turned_D = rotation.T @ token_D
                total_DD += torch.outer(turned_D, turned_D) / len(rotations) / len(tokens_TD)
        return total_DD

    query_NDD, key_KDD = moments.query_output_moments(), moments.key_output_moments()
    for head in range(6):
        expected_DD = literal(heads.key_BKSD[:, head // group].reshape(-1, 5))
        torch.testing.assert_close(query_NDD[head], expected_DD, rtol=1e-6, atol=1e-6)
    for kv_head in range(num_kv_heads):
        expected_DD = literal(heads.query_BNSD[:, kv_head * group : (kv_head + 1) * group].reshape(-1, 5))
        torch.testing.assert_close(key_KDD[kv_head], expected_DD, rtol=1e-6, atol=1e-6)


def test_rotated_scores_change_by_what_the_rotated_factor_says() -> None:
    """Exact before pooling: the sum over pairs of squared changes is a sum over tokens of one quadratic form each."""
    layer = attention_layer(num_kv_heads=6)
    inputs_BSI, change_OI = random_inputs(1, 6), change(layer, QUERY)
    before, after = heads_of(layer, inputs_BSI), heads_of(changed(layer, QUERY, change_OI), inputs_BSI)
    for head in range(6):
        key_SD = before.key_BKSD[0, head]
        measured = ((after.query_BNSD[0, head] - before.query_BNSD[0, head]) @ key_SD.T).square().sum()
        expected = 0.0
        for position in range(6):
            turn_DD = literal_rotation(ROPE, position, num_positions=6, head_dim=5)
            error_D = change_OI.view(6, 5, 10)[head] @ inputs_BSI[0, position]
            expected += float(error_D @ turn_DD.T @ key_SD.T @ key_SD @ turn_DD @ error_D)
        assert float(measured) == pytest.approx(expected, rel=1e-6)


def everything(moments: AttentionMoments) -> list[torch.Tensor]:
    heads = moments.settings.value_heads
    shifts = [moments.value_shift_moment(kv_head) for kv_head in heads] if moments.settings.value_shift else []
    return [moments.query_output_moments(), moments.key_output_moments(), moments.value_input_moments(), *shifts]


def assert_same(first: AttentionMoments, second: AttentionMoments) -> None:
    assert first.num_tokens == second.num_tokens
    assert first.attended.num_rows == second.attended.num_rows
    for found, expected in zip(everything(first), everything(second), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("norms", [False, True])
def test_streaming_and_merging_equal_one_shot(share: float, norms: bool) -> None:
    layer = attention_layer(norms=norms)
    inputs_BSI, other_BSI = random_inputs(5, 9), random_inputs(5, 9, seed=2)
    settings = all_heads(layer, value_shift=True, value_share=share, norm_tokens=4)

    def collect(*parts: tuple[int, int]) -> AttentionMoments:
        moments = AttentionMoments(layer, settings, num_positions=9)
        for begin, end in parts:
            streams = (heads_of(layer, each[begin:end]) for each in (inputs_BSI, other_BSI))
            inputs, reference = streams
            moments.add(inputs, first_window=begin, reference=reference)
        return moments

    whole = collect((0, 5))
    assert_same(collect((0, 2), (2, 3), (3, 5)), whole)
    first, second = collect((0, 3)), collect((3, 5))
    first.merge(second)
    assert_same(first, whole)


@pytest.mark.parametrize("norms", [False, True])
def test_padding_is_the_same_as_removed_tokens(norms: bool) -> None:
    layer = attention_layer(norms=norms)
    inputs_BSI = random_inputs(3, 8)
    lengths = (8, 3, 0)
    valid_BS = torch.arange(8) < torch.tensor(lengths)[:, None]
    heads = heads_of(layer, inputs_BSI)
    hidden = ~valid_BS
    raw_query, raw_key = heads.raw_query_BNSD, heads.raw_key_BKSD
    poisoned = AttentionInputs(
        query_BNSD=heads.query_BNSD.masked_fill(hidden[:, None, :, None], float("nan")),
        key_BKSD=heads.key_BKSD.masked_fill(hidden[:, None, :, None], float("nan")),
        value_BKSD=heads.value_BKSD.masked_fill(hidden[:, None, :, None], float("nan")),
        inputs_BSM=inputs_BSI.masked_fill(hidden[..., None], float("nan")),
        raw_query_BNSD=None if raw_query is None else raw_query.masked_fill(hidden[:, None, :, None], float("nan")),
        raw_key_BKSD=None if raw_key is None else raw_key.masked_fill(hidden[:, None, :, None], float("nan")),
    )
    settings = all_heads(layer, norm_tokens=3)
    padded = AttentionMoments(layer, settings, num_positions=8)
    padded.add(poisoned, valid_BS)
    assert padded.is_finite()
    removed = AttentionMoments(layer, settings, num_positions=8)
    for window, length in enumerate(lengths[:2]):
        removed.add(heads_of(layer, inputs_BSI[window : window + 1, :length]), first_window=window)
    assert padded.num_tokens == 11
    assert_same(padded, removed)


def test_padding_before_tokens_is_refused() -> None:
    layer = attention_layer()
    valid_BS = torch.tensor([[False, True, True]])
    with pytest.raises(ValueError, match="padding must follow"):
        AttentionMoments(layer, FLOAT64, num_positions=3).add(heads_of(layer, random_inputs(1, 3)), valid_BS)


def test_values_that_are_not_finite_are_noticed() -> None:
    layer = attention_layer(norms=True)
    heads = heads_of(layer, random_inputs(1, 4))
    broken = heads.inputs_BSM.clone()
    broken[0, 2, 1] = float("inf")
    moments = AttentionMoments(layer, all_heads(layer), num_positions=4)
    moments.add(heads)
    assert moments.is_finite()
    moments.add(replace(heads, inputs_BSM=broken))
    assert not moments.is_finite()
    rows = AttentionMoments(layer, FLOAT64, num_positions=4)
    rows.add(replace(heads, query_BNSD=heads.query_BNSD * float("nan")))
    assert not rows.is_finite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close(dtype: torch.dtype) -> None:
    layer = attention_layer(norms=True)
    inputs_BSI = random_inputs(4, 20)
    heads = heads_of(layer, inputs_BSI)
    values = {name: getattr(heads, name).to(dtype) for name in AttentionInputs.__dataclass_fields__}
    found = AttentionMoments(layer, replace(all_heads(layer), dtype=torch.float32), num_positions=20)
    found.add(AttentionInputs(**values))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for result, expected in zip(
        everything(found), everything(collected(layer, inputs_BSI, all_heads(layer))), strict=True
    ):
        assert float((result - expected).norm() / expected.norm()) < tolerance


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    ranks = torch.stack([each.argsort().argsort().double() for each in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("name", [QUERY, KEY])
@pytest.mark.parametrize("norms", [False, True])
def test_the_surrogate_ranks_changes_as_the_attention_output_does(name: str, norms: bool) -> None:
    layer = attention_layer(norms=norms, num_kv_heads=2, weight_scale=0.3)
    inputs_BSI, context = random_inputs(3, 12), context_of(layer, 12)
    moments = collected(layer, inputs_BSI, replace(FLOAT64, norm_tokens=12))
    factors_HDD = moments.query_output_moments() if name == QUERY else moments.key_output_moments()
    input_II = torch.einsum("bsi,bsj->ij", inputs_BSI, inputs_BSI)
    before = context.attend(0, *layer.project_heads(inputs_BSI, context), layer.spec)
    surrogates, measured = [], []
    for seed in range(60):
        # Changes of rank one and of the same size differ in direction only.
        full = change(layer, name, seed=seed).view(len(factors_HDD), 5, 10)
        step_HDI = torch.einsum("hd,hi->hdi", full[:, :, 0], full[:, 0])
        step_HDI *= 1e-3 / step_HDI.norm()
        after = context.attend(
            0, *changed(layer, name, step_HDI.flatten(0, 1)).project_heads(inputs_BSI, context), layer.spec
        )
        measured.append((after - before).square().sum())
        surrogates.append(sum(two_sided(factors_HDD[h], step_HDI[h], input_II) for h in range(len(factors_HDD))))
    assert rank_correlation(torch.tensor(surrogates), torch.stack(measured)) > 0.4


def test_memory_is_stated_and_grows_with_the_heads_of_a_pass() -> None:
    layer = attention_layer()
    sizes = [
        bytes_needed(layer.spec, replace(FLOAT64, value_heads=range(heads)), num_positions=64, num_windows=4)
        for heads in (0, 1, 2)
    ]
    assert sizes[2] - sizes[1] == 10 * 10 * 8
    assert sizes[0] >= 8 * 5 * 5 * 8
    shifted = replace(FLOAT64, value_heads=range(2), value_shift=True)
    assert bytes_needed(layer.spec, shifted, num_positions=64, num_windows=4) >= sizes[2] + 2 * 800
