"""Attention over exact and coded keys: against loops in float64, for every kind of score rule and past."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_models import TINY_MODELS, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.kv_cache.codec import decode, encode
from optgptq.kv_cache.hadamard import block_hadamard
from optgptq.kv_cache.scheme import LayerScheme, PastRule, SideScheme
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.kv_cache.transform import HeadTransform
from optgptq.kv_calibration.attend import CacheAttend, LayerQuantizer, SideQuantizer, exact_keys
from optgptq.models.attention import alibi_bias, self_attention
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec

CPU = torch.device("cpu")
LENGTH = 13
PASTS = (
    PastRule(mode="off"),
    PastRule(mode="token"),
    PastRule(mode="chunk", sink_tokens=2),
    PastRule(mode="window", window=4, sink_tokens=1),
    PastRule(mode="token", recent_tokens=3, granule=4),
)


@pytest.fixture(params=["llama-grouped_query", "mistral-short_window", "gemma2-softcaps", "mpt-alibi"])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    family, _, _ = request.param.partition("-")
    names = [tiny.name for tiny in TINY_MODELS if tiny.name.startswith(f"{family}-")]
    name = request.param if request.param in names else names[0]
    folder = tmp_path_factory.mktemp("model")
    save_reference(reference_model(next(tiny for tiny in TINY_MODELS if tiny.name == name)), folder)
    return model_spec(CheckpointFolder.open(folder))


def heads_of(spec: DecoderSpec, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    query, key, value = (torch.randn(2, heads, length, spec.head_dim, generator=generator) for heads in shapes)
    return query, key, value


def quantizer(spec: DecoderSpec, *, key_axis: str = "channel") -> LayerQuantizer:
    generator = torch.Generator().manual_seed(6)
    size = 4 if key_axis == "token" else spec.head_dim
    keys = SideScheme(bits=3, group_size=size, axis=key_axis)  # type: ignore[arg-type]
    values = SideScheme(bits=2, group_size=spec.head_dim)
    rotation_KDD = block_hadamard(spec.head_dim).expand(spec.num_kv_heads, -1, -1)
    shape = (spec.num_kv_heads, spec.head_dim)
    side = SideParameters(
        shift_KD=torch.randn(shape, generator=generator),
        scale_KD=torch.rand(shape, generator=generator) + 0.5,
        rotation_KDD=rotation_KDD,
    )
    layer = LayerParameters(keys=SideParameters() if key_axis == "token" else side, values=side)
    return LayerQuantizer.of(LayerScheme(keys=keys, values=values), layer, CPU)


def literal_attention(
    spec: DecoderSpec,
    layer_index: int,
    heads: tuple[torch.Tensor, ...],
    codes: tuple[torch.Tensor, ...],
    past: PastRule,
) -> torch.Tensor:
    query, key, value = (part.double() for part in heads)
    coded_key, coded_value = (part.double() for part in codes)
    layer, shared = spec.layers[layer_index], spec.num_heads // spec.num_kv_heads
    output = torch.zeros_like(query)
    for batch in range(query.shape[0]):
        for head in range(spec.num_heads):
            own = head // shared
            for i in range(query.shape[2]):
                begin = i if past.mode == "chunk" else 0
                first = 0 if layer.sliding_window is None else max(i - layer.sliding_window + 1, 0)
                scores, rows = [], []
                for t in range(first, i + 1):
                    is_exact = t < past.sink_tokens or t >= past.first_exact(i, begin)
                    vector = (key if is_exact else coded_key)[batch, own, t]
                    rows.append((value if is_exact else coded_value)[batch, own, t])
                    score = float(query[batch, head, i] @ vector) * layer.attention_scale
                    if spec.attention_softcap is not None:
                        score = spec.attention_softcap * math.tanh(score / spec.attention_softcap)
                    if spec.alibi is not None:
                        score += float(alibi_bias(spec.alibi, torch.tensor([t]))[head, 0])
                    scores.append(score)
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                output[batch, head, i] = sum(w * row for w, row in zip(weights, rows, strict=True))
    return output


@pytest.mark.parametrize("past", PASTS, ids=lambda past: past.name)
def test_attention_is_what_the_rule_says(spec: DecoderSpec, past: PastRule) -> None:
    heads, layer = heads_of(spec), quantizer(spec)
    assert layer.keys is not None
    assert layer.values is not None
    attend = CacheAttend(layers={1: layer}, past=past)
    expected = literal_attention(spec, 1, heads, (layer.keys(heads[1]), layer.values(heads[2])), past)
    torch.testing.assert_close(attend(1, *heads, spec).double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_one_side_may_be_exact(spec: DecoderSpec, side: str) -> None:
    heads, both = heads_of(spec), quantizer(spec)
    layer = LayerQuantizer(keys=both.keys if side == "keys" else None, values=both.values if side == "values" else None)
    codes = [
        part if quantize is None else quantize(part)
        for part, quantize in zip(heads[1:], (layer.keys, layer.values), strict=True)
    ]
    found = CacheAttend(layers={0: layer}, past=PASTS[3])(0, *heads, spec)
    expected = literal_attention(spec, 0, heads, tuple(codes), PASTS[3])
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


def test_a_layer_without_codes_is_plain_attention(spec: DecoderSpec) -> None:
    heads = heads_of(spec)
    output = CacheAttend(layers={})(0, *heads, spec)
    torch.testing.assert_close(output, self_attention(0, *heads, spec), rtol=2e-5, atol=2e-5)


def test_long_windows_are_cut_without_a_trace(spec: DecoderSpec) -> None:
    """More queries than are worked on together: what comes first does not depend on what follows."""
    heads, layer = heads_of(spec, 300), quantizer(spec)
    attend = CacheAttend(layers={0: layer})
    whole = attend(0, *heads, spec)
    for length in (256, 257):
        part = attend(0, *(head[:, :, :length] for head in heads), spec)  # type: ignore[call-arg]
        torch.testing.assert_close(whole[:, :, :length], part, rtol=1e-5, atol=1e-5)


def test_vectors_through_codes_are_those_of_the_run_time(spec: DecoderSpec) -> None:
    """Transforms before and after are those of `HeadTransform`, and codes those of the codec."""
    _, _, value = heads_of(spec)
    layer = quantizer(spec)
    assert layer.values is not None
    side = layer.values.parameters
    transform = HeadTransform(keys=SideParameters(), values=side)
    value_TKD = value.transpose(1, 2).flatten(0, 1)
    stored_TKD = decode(encode(transform.value(value_TKD), layer.values.codec), layer.values.scheme)
    found_TKD = layer.values(value).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found_TKD, transform.output(stored_TKD), rtol=1e-5, atol=1e-5)


def test_groups_along_tokens_become_codes_when_they_are_full(spec: DecoderSpec) -> None:
    _, key, _ = heads_of(spec)
    layer = quantizer(spec, key_axis="token")
    assert layer.keys is not None
    found = layer.keys(key)
    assert torch.equal(found[:, :, 12:], key[:, :, 12:])
    assert not torch.equal(found[:, :, :12], key[:, :, :12])
    low, high = key[:, :, 4:8].amin(2), key[:, :, 4:8].amax(2)
    step = ((high - low) / 7).unsqueeze(2)
    assert ((found[:, :, 4:8] - key[:, :, 4:8]).abs() <= step * 0.51 + 2e-3).all()


def test_an_exact_side_has_no_quantizer() -> None:
    assert SideQuantizer.of(SideScheme(), SideParameters(), CPU) is None


def test_sinks_and_the_own_key_are_exact() -> None:
    found = exact_keys(PastRule(mode="chunk", sink_tokens=1), 4, CPU)
    assert found.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 1]]
