"""Quantized models of every family in the engine write what transformers writes with the decoded weights in its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import quantize_all, write_checkpoint
from support.tiny_models import TINY_MODELS, random_tokens, reference_greedy, reference_model, save_reference

from optgptq.affine_weight import AffineWeight
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.layout import LinearLayout
from optgptq.models.inventory import LinearInfo, model_linears
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.layer_groups import layer_groups, plain_page_bytes
from optgptq.runtime.linear import QuantLinear
from optgptq.runtime.llm import generate
from optgptq.runtime.load import HeldWeights, load_model
from optgptq.scheduling.sampling_params import SamplingParams

# One of each family, those with the most that is special. GPT-2 is stored transposed, which only GPTQ can say.
FORMATS = {
    "llama-multi_head_biases": "gptq_v2",
    "llama-rope_dynamic": "compressed-tensors",
    "mistral-short_window": "compressed-tensors",
    "qwen2-late_window": "gptq_v2",
    "qwen3-biases_tied": "compressed-tensors",
    "gemma-plain": "gptq_v2",
    "gemma2-softcaps": "compressed-tensors",
    "gemma3text-local_global": "gptq_v2",
    "phi3-longrope": "compressed-tensors",
    "gpt2-conv1d": "gptq_v2",
    "gptneox-parallel": "compressed-tensors",
    "opt-post_norm_projected": "gptq_v2",
    "bloom-six_heads": "compressed-tensors",
    "mpt-six_heads_clipped": "gptq_v2",
    "falcon-rw_alibi": "compressed-tensors",
    "falcon-grouped": "gptq_v2",
}
NEW = 20
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
# On both sides of the sliding windows, of the 16 and 64 positions where frequencies change, and of pages.
PROMPTS = [random_tokens(1, size, seed=size)[0].tolist() for size in (3, 12, 61, 16)]
LIMITS = {"page_size": 8, "max_length": 88, "max_step_tokens": 11}


@dataclass(frozen=True)
class Case:
    path: Path
    spec: DecoderSpec
    expected: list[list[int]]


def layout_of(info: LinearInfo) -> LinearLayout:
    return LinearLayout(
        name=info.name,
        out_features=info.out_features,
        in_features=info.in_features,
        bits=4,
        group_size=-1 if info.in_features % 32 else 32,
        symmetric=False,
        stored_transposed=info.stored_transposed,
        fused_names=info.fused_names,
        fused_name=info.fused_name,
    )


def put_decoded(model: Any, layouts: list[LinearLayout], weights: Mapping[str, AffineWeight]) -> None:
    parameters = dict(model.named_parameters())
    for layout in layouts:
        decoded_OI = weights[layout.name].dequantize()
        parameter = parameters[f"{layout.name}.weight"]
        stored = decoded_OI.t() if layout.stored_transposed else decoded_OI
        assert parameter.shape == stored.shape
        assert not torch.equal(parameter, stored)
        with torch.no_grad():
            parameter.copy_(stored)


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("tiny")
    model = reference_model(next(tiny for tiny in TINY_MODELS if tiny.name == request.param))
    source = CheckpointFolder.open(save_reference(model, folder / "dense"))
    spec = model_spec(source)
    layouts = [layout_of(info) for info in model_linears(spec)]
    weights = quantize_all(source, layouts, format_name=FORMATS[request.param])
    write_checkpoint(source, folder / "out", layouts, weights, format_name=FORMATS[request.param])
    put_decoded(model, layouts, weights)
    return Case(folder / "out", spec, [reference_greedy(model, prompt, NEW) for prompt in PROMPTS])


def engine_of(case: Case, held: HeldWeights, **settings: Any) -> Engine:
    decoder = load_model(case.path, weights=held)
    kinds = {isinstance(linear, QuantLinear) for layer in decoder.layers for linear in layer.linears.values()}
    assert kinds == {held == "exact"}
    return Engine(decoder, None, EngineSettings(**LIMITS, **settings))


def tokens(engine: Engine) -> list[list[int]]:
    results = generate(engine, PROMPTS, GREEDY)
    assert [result.error for result in results] == [None] * len(PROMPTS)
    return [result.token_ids for result in results]


@pytest.mark.parametrize("held", ["exact", "dense"])
def test_with_prefix_hits(case: Case, held: HeldWeights) -> None:
    engine = engine_of(case, held)
    assert tokens(engine) == case.expected
    hits = engine.usage().prefix_hit_tokens
    assert tokens(engine) == case.expected
    assert engine.usage().prefix_hit_tokens > hits


@pytest.mark.parametrize("held", ["exact", "dense"])
def test_with_preemption(case: Case, held: HeldWeights) -> None:
    page_bytes = plain_page_bytes(case.spec, page_size=LIMITS["page_size"], number_bytes=4)
    groups = layer_groups(case.spec, layer_page_bytes=page_bytes, **LIMITS)
    one_text = sum(group.page_bytes * (group.pages_per_text + 1) for group in groups)
    engine = engine_of(case, held, kv_cache_bytes=one_text, watermark_ratio=0.0)
    assert tokens(engine) == case.expected
    usage = engine.usage()
    assert usage.num_preemptions > 0
    assert usage.allocated_slots == 0
