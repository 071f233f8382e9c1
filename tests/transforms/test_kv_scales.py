"""Scales of keys and values in the weights: keys and values are divided, and the model computes what it computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.quantizable import tiny_model
from support.tiny_models import TINY_MODELS, TinyModel, random_tokens
from support.transformed import (
    EVERYTHING,
    VALUES,
    exact_logits,
    relative_error,
    saved,
    write_dense,
)

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.source import TensorSource
from optgptq.errors import ExitCode, ModelError
from optgptq.models.checks import check_inventory
from optgptq.models.decoder import load_decoder
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.transforms.kv_scales import KVScales, check_kv_scales, rotary_pairs, shares_key_scale
from optgptq.transforms.settings import TransformSettings
from optgptq.transforms.source import transformed_source

NOTHING = TransformSettings()


def random_scales(spec: DecoderSpec, *, seed: int = 0) -> list[KVScales]:
    """Return scales between 1/4 and 4 for every layer, as different as the model allows."""
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.num_kv_heads, spec.head_dim)
    scales = []
    for pairs in rotary_pairs(spec):
        key_KD, value_KD = (4 ** (2 * torch.rand(*shape, generator=generator).double() - 1) for _ in range(2))
        if shares_key_scale(spec):
            key_KD = key_KD[:1].repeat(spec.num_kv_heads, 1)
        if pairs is not None:
            half = pairs.rotary_dim // 2
            key_KD[:, half : 2 * half] = key_KD[:, :half]
        scales.append(KVScales(key_KD=key_KD, value_KD=value_KD))
    return scales


def scaled(folder: CheckpointFolder, scales: list[KVScales], settings: TransformSettings = NOTHING) -> TensorSource:
    view, spec = transformed_source(folder, model_spec(folder), settings, kv_scales=scales)
    check_inventory(view, spec)
    assert model_spec(view) == spec
    return view


def keys_and_values(source: TensorSource) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what a cache of each layer stores, float64 `[T, K, D]`."""
    seen = []

    def record(layer_index, query, key, value, spec, /):
        seen.append((key[0].transpose(0, 1).clone(), value[0].transpose(0, 1).clone()))
        return self_attention(layer_index, query, key, value, spec)

    from optgptq.models.attention import attention_context, self_attention

    decoder = load_decoder(source, dtype=torch.float64)
    tokens_BS = random_tokens(1, 11)
    context = attention_context(decoder.spec, 11, dtype=torch.float64, attend=record)
    hidden = decoder.embedding.embed(tokens_BS, context)
    for layer in decoder.layers:
        hidden = layer.forward(hidden, context)
    return seen


@pytest.mark.parametrize(
    "tiny", [tiny for tiny in TINY_MODELS if "clipped" not in tiny.name], ids=lambda tiny: tiny.name
)
def test_every_family_computes_the_same_with_divided_keys_and_values(tiny: TinyModel, tmp_path: Path) -> None:
    folder = saved(tiny, tmp_path / "model")
    scales = random_scales(model_spec(folder))
    view = scaled(folder, scales)
    tokens_BS = random_tokens(2, 19)
    before, after = (exact_logits(load_decoder(source, dtype=torch.float64), tokens_BS) for source in (folder, view))
    # Gemma's norms and soft caps run in float32 whatever the dtype.
    tolerance = 1e-5 if "gemma" in tiny.name else 1e-10
    assert relative_error(after, before) < tolerance
    pairs = zip(keys_and_values(folder), keys_and_values(view), scales, strict=True)
    for (key_TKD, value_TKD), (new_key_TKD, new_value_TKD), scale in pairs:
        assert scale.key_KD is not None
        assert scale.value_KD is not None
        assert relative_error(new_key_TKD * scale.key_KD, key_TKD) < tolerance
        assert relative_error(new_value_TKD * scale.value_KD, value_TKD) < tolerance


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (8, 2), (7, 1), (8, 1), (14, 2)])
@pytest.mark.parametrize("name", ["qwen2-biases", "qwen3-biases_tied", "falcon-grouped", "phi3-longrope"])
def test_every_ratio_of_heads(name: str, num_heads: int, num_kv_heads: int, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": num_heads, "hidden_size": 8 * num_heads, "num_hidden_layers": 1}
    heads = {"num_kv_heads": num_kv_heads} if "falcon" in name else {"num_key_value_heads": num_kv_heads}
    # The rotary factors of this Phi-3 are for six channels.
    tiny = tiny_model(name, **sizes, **heads)
    folder = saved(tiny, tmp_path / "model")
    spec = model_spec(folder)
    assert (spec.num_heads, spec.num_kv_heads) == (num_heads, num_kv_heads)
    view = scaled(folder, random_scales(spec))
    tokens_BS = random_tokens(2, 9)
    before, after = (exact_logits(load_decoder(source, dtype=torch.float64), tokens_BS) for source in (folder, view))
    assert relative_error(after, before) < 1e-10


@pytest.mark.parametrize("tiny", ["llama-grouped_query", "gpt2-conv1d", "gemma-plain", "gptneox-parallel"])
@pytest.mark.parametrize("settings", [VALUES, EVERYTHING], ids=["values", "everything"])
def test_scales_go_with_the_other_transforms(tiny: str, settings: TransformSettings, tmp_path: Path) -> None:
    """They are scales of the rotated values."""
    folder = saved(tiny_model(tiny), tmp_path / "model")
    scales = random_scales(model_spec(folder))
    view, rotated = scaled(folder, scales, settings), scaled(folder, [KVScales()] * len(scales), settings)
    tokens_BS = random_tokens(2, 19)
    before, after = (exact_logits(load_decoder(source, dtype=torch.float64), tokens_BS) for source in (folder, view))
    assert relative_error(after, before) < (1e-5 if "gemma" in tiny else 1e-10)
    for (_, value_TKD), (_, new_value_TKD), scale in zip(
        keys_and_values(rotated), keys_and_values(view), scales, strict=True
    ):
        assert scale.value_KD is not None
        assert relative_error(new_value_TKD * scale.value_KD, value_TKD) < 1e-6


@pytest.mark.parametrize("tiny", ["llama-grouped_query", "qwen3-norms", "gemma3text-local_global", "gpt2-conv1d"])
def test_float32_models_agree_to_float32(tiny: str, tmp_path: Path) -> None:
    folder = saved(tiny_model(tiny), tmp_path / "model", dtype=torch.float32)
    view = scaled(folder, random_scales(model_spec(folder)))
    assert {info.dtype for info in view.tensors.values()} == {"F32"}
    tokens_BS = random_tokens(2, 19)
    assert relative_error(load_decoder(view).logits(tokens_BS), load_decoder(folder).logits(tokens_BS)) < 1e-5


def test_tensors_are_those_of_the_formulas(tmp_path: Path) -> None:
    """Literal version: one row at a time; six query heads share two of four channels."""
    folder = saved(tiny_model("qwen2-biases"), tmp_path / "model")
    scales = random_scales(model_spec(folder))
    view = scaled(folder, scales)
    key_KD, value_KD = scales[1].key_KD, scales[1].value_KD
    assert key_KD is not None
    assert value_KD is not None
    prefix = "model.layers.1.self_attn"
    for leaf in ("weight", "bias"):
        query, key, value = (folder.read(f"{prefix}.{name}_proj.{leaf}") for name in "qkv")
        for head in range(6):
            for channel in range(4):
                query[4 * head + channel] *= key_KD[head // 3, channel]
        for head in range(2):
            for channel in range(4):
                key[4 * head + channel] /= key_KD[head, channel]
                value[4 * head + channel] /= value_KD[head, channel]
        for name, expected in zip("qkv", (query, key, value), strict=True):
            assert torch.allclose(view.read(f"{prefix}.{name}_proj.{leaf}"), expected, rtol=1e-14, atol=0)
    output_OI = folder.read(f"{prefix}.o_proj.weight")
    for head in range(6):
        for channel in range(4):
            output_OI[:, 4 * head + channel] *= value_KD[head // 3, channel]
    assert torch.allclose(view.read(f"{prefix}.o_proj.weight"), output_OI, rtol=1e-14, atol=0)
    others = [name for name in folder.tensors if "self_attn" not in name]
    assert all(torch.equal(view.read(name), folder.read(name)) for name in others)


@pytest.mark.parametrize(("tiny", "offset"), [("qwen3-norms", 0.0), ("gemma3text-local_global", 1.0)])
def test_gains_of_norms_take_the_scales_of_keys(tiny: str, offset: float, tmp_path: Path) -> None:
    folder = saved(tiny_model(tiny), tmp_path / "model")
    scales = random_scales(model_spec(folder))
    view = scaled(folder, [replace(layer, value_KD=None) for layer in scales])
    key_KD = scales[2].key_KD
    assert key_KD is not None
    gain_D = folder.read("model.layers.2.self_attn.k_norm.weight")
    expected_D = (gain_D + offset) / key_KD[0] - offset
    assert torch.allclose(view.read("model.layers.2.self_attn.k_norm.weight"), expected_D, rtol=1e-13, atol=1e-14)
    chunks = torch.cat([chunk.clone() for chunk in view.read_chunks("model.layers.2.self_attn.k_norm.weight", 16)])
    assert torch.equal(chunks.view(torch.float64), view.read("model.layers.2.self_attn.k_norm.weight"))
    changed = {name for name in folder.tensors if not torch.equal(view.read(name), folder.read(name))}
    assert changed == {name for name in folder.tensors if "q_norm" in name or "k_norm" in name}


def test_written_models_are_ordinary_ones(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama-tied"), tmp_path / "model")
    view = scaled(folder, random_scales(model_spec(folder)))
    written = write_dense(view, tmp_path / "written")
    tokens_BS = random_tokens(1, 9)
    before, after = (exact_logits(load_decoder(item, dtype=torch.float64), tokens_BS) for item in (folder, written))
    assert relative_error(after, before) < 1e-10
    assert set(written.tensors) == set(folder.tensors)


def test_scales_of_one_change_nothing(tmp_path: Path) -> None:
    folder = saved(tiny_model("falcon-grouped"), tmp_path / "model", dtype=torch.float16)
    spec = model_spec(folder)
    ones_KD = torch.ones(spec.num_kv_heads, spec.head_dim)
    view = scaled(folder, [KVScales(key_KD=ones_KD, value_KD=ones_KD)] * spec.num_layers)
    assert all(torch.equal(view.read(name), folder.read(name)) for name in folder.tensors)
    assert transformed_source(folder, spec, NOTHING) == (folder, spec)


def refusal(folder: CheckpointFolder, scales: list[KVScales]) -> ModelError:
    with pytest.raises(ModelError) as caught:
        scaled(folder, scales)
    assert caught.value.exit_code == ExitCode.INPUT
    assert caught.value.action == "Set kv_cache.fold=false for this model: its scales are then applied at run time."
    return caught.value


@pytest.mark.parametrize(
    ("tiny", "channel", "partner"),
    [("llama-rope_llama3", 1, 9), ("gptneox-parallel", 1, 3), ("phi3-longrope", 2, 5), ("gemma-plain", 0, 5)],
)
def test_scales_of_rotary_pairs_must_be_tied(tiny: str, channel: int, partner: int, tmp_path: Path) -> None:
    """And rightly: without the check the model computes something else."""
    folder = saved(tiny_model(tiny), tmp_path / "model")
    spec = model_spec(folder)
    scales = random_scales(spec)
    key_KD = scales[1].key_KD
    assert key_KD is not None
    head = spec.num_kv_heads - 1
    key_KD[head, partner] *= 2
    error = refusal(folder, scales)
    assert error.where == "kv_cache.fold, decoder layer 1"
    assert f"turns channels {channel} and {partner} of a head together, and head {head} has the scales" in error.found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optgptq.transforms.source.check_kv_scales", lambda *_, **__: None)
        view = scaled(folder, scales)
    tokens_BS = random_tokens(2, 19)
    before, after = (exact_logits(load_decoder(source, dtype=torch.float64), tokens_BS) for source in (folder, view))
    assert relative_error(after, before) > 1e-4


@pytest.mark.parametrize("tiny", ["gpt2-conv1d", "mpt-alibi", "bloom-alibi", "falcon-rw_alibi"])
def test_channels_without_rotation_are_free(tiny: str, tmp_path: Path) -> None:
    folder = saved(tiny_model(tiny), tmp_path / "model")
    spec = model_spec(folder)
    assert set(rotary_pairs(spec)) == {None}
    key_KD = random_scales(spec)[0].key_KD
    assert key_KD is not None
    assert len(set(key_KD.flatten().tolist())) == key_KD.numel()


def test_channels_beyond_the_rotated_ones_are_free(tmp_path: Path) -> None:
    spec = model_spec(saved(tiny_model("gptneox-parallel"), tmp_path / "model"))
    (pairs,) = set(rotary_pairs(spec))
    assert pairs is not None
    assert (pairs.rotary_dim, spec.head_dim) == (4, 16)
    scales = random_scales(spec)
    key_KD = scales[0].key_KD
    assert key_KD is not None
    assert len(set(key_KD[0].tolist())) == 14
    check_kv_scales(spec, scales, family="gpt_neox")


def test_heads_that_share_a_norm_share_their_scales(tmp_path: Path) -> None:
    folder = saved(tiny_model("qwen3-norms"), tmp_path / "model")
    scales = random_scales(model_spec(folder))
    key_KD = scales[0].key_KD
    assert key_KD is not None
    key_KD[1] *= 2
    error = refusal(folder, scales)
    assert error.found == "qwen3: the heads of a layer share the gain of one norm, and their scales differ"


@pytest.mark.parametrize("side", ["key_KD", "value_KD"])
def test_clipped_models_are_refused(side: str, tmp_path: Path) -> None:
    folder = saved(tiny_model("mpt-six_heads_clipped"), tmp_path / "model")
    spec = model_spec(folder)
    scale_KD = torch.full((spec.num_kv_heads, spec.head_dim), 2.0)
    error = refusal(folder, [KVScales(**{side: scale_KD})] * spec.num_layers)
    assert "clipped at 0.4, which a scale moves" in error.found
    scaled(folder, [KVScales()] * spec.num_layers)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan])
def test_scales_are_positive_and_fit(value: float, tmp_path: Path) -> None:
    folder = saved(tiny_model("llama-grouped_query"), tmp_path / "model")
    spec = model_spec(folder)
    scales = random_scales(spec)
    value_KD = scales[0].value_KD
    assert value_KD is not None
    with pytest.raises(ValueError, match=r"\[2, 4\]; found \[2, 3\]"):
        scaled(folder, [KVScales(value_KD=value_KD[:, :3]), *scales[1:]])
    with pytest.raises(ValueError, match="scales of 2 layers for a model of 3"):
        scaled(folder, scales[1:])
    value_KD[1, 2] = value
    with pytest.raises(ValueError, match="scales must be positive"):
        scaled(folder, scales)
