"""Rows of heads against what the decoder layer does with the outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import TINY_MODELS, TinyModel, reference_model, save_reference

from optgptq.calibration.head_rows import head_rows
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.models.attention import AttentionContext, self_attention
from optgptq.models.layer import DecoderLayer, LayerNorms
from optgptq.models.linear import Linear
from optgptq.models.loading import load_layer
from optgptq.models.registry import config_spec, model_spec
from optgptq.models.spec import DecoderSpec

# Every layout, with one, some and all query heads sharing a key/value head.
NAMES = (
    "llama-grouped_query",
    "llama-multi_query",
    "llama-multi_head_biases",
    "phi3-longrope",
    "gpt2-conv1d",
    "gptneox-parallel",
    "bloom-alibi",
    "mpt-alibi",
    "falcon-multi_query",
    "falcon-rw_rotary",
    "falcon-grouped",
)
MODELS = [tiny for tiny in TINY_MODELS if tiny.name in NAMES]


def spec_of(tiny: TinyModel) -> DecoderSpec:
    return config_spec(reference_model(tiny).config.to_dict())


def test_every_model_and_layout_is_here() -> None:
    assert len(MODELS) == len(NAMES)
    layouts = {spec_of(tiny).qkv_layout for tiny in MODELS}
    assert layouts == {"split", "concatenated", "per_head_interleaved", "grouped_interleaved"}


@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_rows_times_inputs_are_the_heads_of_the_layer(tiny: TinyModel, tmp_path: Path) -> None:
    folder = CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path / "model"))
    spec = model_spec(folder)
    loaded = load_layer(folder, spec, 0, dtype=torch.float32)
    weights: dict[str, torch.Tensor] = {}
    for name in spec.stage("qkv").linears:
        linear = loaded.linears[name]
        assert isinstance(linear, Linear)
        weights[name] = linear.weight_OI
    unbiased = DecoderLayer(
        spec=_unrotated(spec),
        index=0,
        linears={name: Linear(weight) for name, weight in weights.items()},
        norms=LayerNorms(),
    )
    inputs_BSM = torch.randn(2, 3, spec.hidden_size, generator=torch.Generator().manual_seed(0))
    context = AttentionContext(positions=torch.arange(3), rope_tables={}, attend=self_attention)
    heads = unbiased.project_heads(inputs_BSM, context)
    rows = head_rows(spec)
    for projection, expected_BNSD in zip((rows.query, rows.key, rows.value), heads, strict=True):
        weight_NDI = weights[projection.linear][projection.rows_ND]
        found_BNSD = torch.einsum("bsi,ndi->bnsd", inputs_BSM, weight_NDI)
        torch.testing.assert_close(found_BNSD, expected_BNSD, rtol=1e-4, atol=1e-5)


def _unrotated(spec: DecoderSpec) -> DecoderSpec:
    return replace(spec, clip_qkv=None, layers=tuple(replace(layer, rope=None) for layer in spec.layers))


@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_the_heads_are_every_row_once_and_can_be_put_back(tiny: TinyModel) -> None:
    spec = spec_of(tiny)
    rows = head_rows(spec)
    parts: dict[str, list[torch.Tensor]] = {}
    for projection, number in (
        (rows.query, spec.num_heads),
        (rows.key, spec.num_kv_heads),
        (rows.value, spec.num_kv_heads),
    ):
        assert projection.rows_ND.shape == (number, spec.head_dim)
        assert projection.rows_ND.dtype == torch.int64
        parts.setdefault(projection.linear, []).append(projection.rows_ND.flatten())
    assert tuple(parts) == spec.stage("qkv").linears
    for taken in parts.values():
        order = torch.cat(taken)
        assert order.sort().values.tolist() == list(range(len(order)))
        weight_OI = torch.randn(len(order), 3, generator=torch.Generator().manual_seed(1))
        restored_OI = torch.empty_like(weight_OI)
        restored_OI[order] = weight_OI[order]
        assert torch.equal(restored_OI, weight_OI)
