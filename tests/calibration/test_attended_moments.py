"""Moments of attended inputs against attention weights written out, and positions that are drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_layers import attention_layer, changed, literal_weights, random_inputs
from support.attention_moments import (
    FLOAT64,
    KEY,
    VALUE,
    all_heads,
    change,
    collected,
    context_of,
    heads_of,
    two_sided,
)

from optgptq.calibration.attended_moments import AttendedMoments, WindowHeads
from optgptq.calibration.attention_moments import AttentionMoments
from optgptq.errors import NumericalError
from optgptq.models.spec import DecoderSpec
from optgptq.native.library import load_library

_library = load_library()
needs_fused = pytest.mark.skipif(
    _library is None or not _library.bfloat16_products, reason="no native library, or no products of bfloat16"
)

VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "plain": {"rope": None},
    "alibi": {"rope": None, "alibi": True},
    "window": {"window": 3},
    "softcap": {"softcap": 0.8},
    "norms": {"norms": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("gram", [False, True])
def test_value_moment_is_that_of_attended_inputs(
    variant: str, num_kv_heads: int, gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optgptq.calibration.attended_moments._gram_is_cheaper", lambda *_: gram)
    monkeypatch.setattr("optgptq.calibration.attended_moments._POSITIONS_PER_CHUNK", 4)
    monkeypatch.setattr("optgptq.calibration.attended_moments._COLUMNS_PER_BLOCK", 3)
    layer = attention_layer(num_kv_heads=num_kv_heads, **VARIANTS[variant])
    inputs_BSI = random_inputs(2, 7)
    heads = heads_of(layer, inputs_BSI)
    moments = collected(layer, inputs_BSI, all_heads(layer))
    group = 6 // num_kv_heads
    assert moments.attended.num_rows == 2 * 7 * group
    expected_KII = torch.zeros(num_kv_heads, 10, 10, dtype=torch.float64)
    for batch in range(2):
        for head in range(6):
            weights_SS = literal_weights(
                layer, heads.query_BNSD[batch, head], heads.key_BKSD[batch, head // group], head
            )
            attended_SI = weights_SS @ inputs_BSI[batch]
            expected_KII[head // group] += attended_SI.T @ attended_SI / (14 * group)
    # The bias of ALiBi is float32 in the model.
    tolerance = 1e-6 if variant == "alibi" else 1e-11
    found_KII = moments.value_input_moments()
    torch.testing.assert_close(found_KII, expected_KII, rtol=tolerance, atol=tolerance)
    assert torch.equal(moments.value_input_moment(num_kv_heads - 1), found_KII[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_value_moment_prices_the_true_change_of_the_output(variant: str) -> None:
    """Exact for a change of any size, also behind an output projection where no heads share a value."""
    layer = attention_layer(num_kv_heads=6, **VARIANTS[variant])
    inputs_BSI, change_OI = random_inputs(1, 7), change(layer, VALUE)
    context = context_of(layer, 7)
    outputs = []
    for each in (layer, changed(layer, VALUE, change_OI)):
        outputs.append(context.attend(0, *each.project_heads(inputs_BSI, context), layer.spec))
    moments_KII = collected(layer, inputs_BSI, all_heads(layer)).value_input_moments()
    # Where scores are capped, the model takes them in float32.
    tolerance = 1e-6 if variant == "softcap" else 1e-9
    projection_NMD = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for head in range(6):
        error_SD, change_DI = (outputs[1] - outputs[0])[0, head], change_OI.view(6, 5, 10)[head]
        identity_DD = torch.eye(5, dtype=torch.float64)
        expected = float(error_SD.square().mean(dim=0).sum())
        assert two_sided(identity_DD, change_DI, moments_KII[head]) == pytest.approx(expected, rel=tolerance)
        expected = float((error_SD @ projection_NMD[head].T).square().mean(dim=0).sum())
        row_DD = projection_NMD[head].T @ projection_NMD[head]
        assert two_sided(row_DD, change_DI, moments_KII[head]) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("num_kv_heads", [1, 3])
@pytest.mark.parametrize("gram", [False, True])
def test_value_shift_compares_the_attended_inputs_of_two_streams(
    num_kv_heads: int, gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optgptq.calibration.attended_moments._gram_is_cheaper", lambda *_: gram)
    monkeypatch.setattr("optgptq.calibration.attended_moments._POSITIONS_PER_CHUNK", 4)
    layer = attention_layer(num_kv_heads=num_kv_heads)
    original = changed(layer, KEY, change(layer, KEY, size=0.1))
    inputs_BSI = random_inputs(2, 7)
    other_BSI = inputs_BSI + 0.1 * random_inputs(2, 7, seed=9)
    heads, reference = heads_of(layer, inputs_BSI), heads_of(original, other_BSI)
    moments = AttentionMoments(layer, all_heads(layer, value_shift=True), num_positions=7)
    moments.add(heads, reference=reference)
    group = 6 // num_kv_heads
    for kv_head in range(num_kv_heads):
        expected_II = torch.zeros(10, 10, dtype=torch.float64)
        for batch in range(2):
            for head in range(kv_head * group, (kv_head + 1) * group):
                pairs = ((heads, layer, inputs_BSI), (reference, original, other_BSI))
                attended_SI, target_SI = (
                    literal_weights(owner, each.query_BNSD[batch, head], each.key_BKSD[batch, kv_head], head)
                    @ values_BSI[batch]
                    for each, owner, values_BSI in pairs
                )
                expected_II += (target_SI - attended_SI).T @ attended_SI / (14 * group)
        torch.testing.assert_close(moments.value_shift_moment(kv_head), expected_II, rtol=1e-9, atol=1e-11)


def test_equal_streams_have_no_shift() -> None:
    layer = attention_layer()
    heads = heads_of(layer, random_inputs(1, 6))
    moments = AttentionMoments(layer, all_heads(layer, value_shift=True), num_positions=6)
    moments.add(heads, reference=heads)
    assert float(moments.value_shift_moment(1).abs().max()) < 1e-12


def test_key_value_heads_in_several_passes_are_those_of_one() -> None:
    layer = attention_layer(num_kv_heads=3)
    inputs_BSI = random_inputs(2, 6)
    whole = collected(layer, inputs_BSI, all_heads(layer)).value_input_moments()
    parts = [
        collected(layer, inputs_BSI, replace(FLOAT64, rows=False, value_heads=heads))
        for heads in (range(2), range(2, 3))
    ]
    found = torch.cat([part.value_input_moments() for part in parts])
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-13)
    assert parts[0].num_tokens == 0


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0.01, 1.0), length=st.integers(1, 40), seed=st.integers(0, 5))
def test_a_share_of_positions_is_drawn(share: float, length: int, seed: int) -> None:
    layer = attention_layer()
    moments = collected(layer, random_inputs(1, length), all_heads(layer, value_share=share, seed=seed))
    assert moments.attended.num_rows == 3 * max(1, round(share * length))


def test_a_share_of_positions_has_the_right_mean() -> None:
    layer = attention_layer()
    inputs_BSI = random_inputs(40, 12)
    whole = collected(layer, inputs_BSI, all_heads(layer)).value_input_moments()
    drawn = [
        collected(layer, inputs_BSI, all_heads(layer, value_share=0.25, seed=seed)).value_input_moments()
        for seed in range(6)
    ]
    assert not torch.equal(drawn[0], drawn[1])
    assert float((drawn[0] - whole).norm() / whole.norm()) < 0.25
    assert float((torch.stack(drawn).mean(dim=0) - whole).norm() / whole.norm()) < 0.08


def _wide_spec(*, window: int | None = None) -> DecoderSpec:
    spec = attention_layer(rope=None, window=window).spec
    return replace(spec, hidden_size=48, head_dim=16, num_heads=4, num_kv_heads=2)


def _bfloat16_windows(seed: int) -> WindowHeads:
    generator = torch.Generator().manual_seed(seed)
    heads = (torch.randn(3, 70, number, 16, generator=generator).bfloat16().transpose(1, 2) for number in (4, 2))
    return WindowHeads(*heads, torch.randn(3, 70, 48, generator=generator).bfloat16())


def _moments_of(windows: WindowHeads, reference: WindowHeads | None, spec: DecoderSpec) -> AttendedMoments:
    dtype = torch.promote_types(windows.inputs_BTI.dtype, torch.float32)
    moments = AttendedMoments(spec, 0, range(2), dtype=dtype, shift=reference is not None, device="cpu")
    positions_BS = torch.stack([torch.arange(first, 70, 3)[:20] for first in range(3)])
    moments.add(windows, positions_BS, reference=reference)
    return moments


def _in_float64(windows: WindowHeads) -> WindowHeads:
    return WindowHeads(windows.query_BNTD.double(), windows.key_BKTD.double(), windows.inputs_BTI.double())


@needs_fused
@pytest.mark.parametrize("rows", [1, 7, 60, 4096])
def test_compiled_attention_gives_the_same_moments(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and positions in parts of any size. In float64 maps are written out."""
    windows, reference = _bfloat16_windows(0), _bfloat16_windows(1)
    expected = _moments_of(_in_float64(windows), _in_float64(reference), _wide_spec())
    monkeypatch.setattr("optgptq.calibration.attended_moments._FUSED_NUMBERS", 0)
    monkeypatch.setattr("optgptq.calibration.attended_moments._ROWS_PER_CHUNK", rows)
    found = _moments_of(windows, reference, _wide_spec())
    assert found.num_rows == expected.num_rows == 3 * 20 * 2
    for kv_head in range(2):
        for mine, theirs in (
            (found.moments[kv_head].mean(), expected.moments[kv_head].mean()),
            (found.shift_mean(kv_head), expected.shift_mean(kv_head)),
        ):
            assert float((mine - theirs).norm() / theirs.norm()) < 2.0**-8


@needs_fused
def test_a_window_of_keys_is_never_fused() -> None:
    with_window = _moments_of(_bfloat16_windows(0), None, _wide_spec(window=5))
    without = _moments_of(_bfloat16_windows(0), None, _wide_spec())
    assert float((with_window.moments[0].mean() - without.moments[0].mean()).norm()) > 0.1


@needs_fused
def test_scores_that_are_no_number_are_told() -> None:
    windows = _bfloat16_windows(0)
    windows.key_BKTD[0, 0, 3] = torch.nan
    with pytest.raises(NumericalError, match="softmax attention"):
        _moments_of(windows, None, _wide_spec())
