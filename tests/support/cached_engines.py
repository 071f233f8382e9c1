"""Engines with quantized caches on tiny models: random setups, and what they must write.

Shapes: `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch
from support.tiny_models import TINY_MODELS, TinyModel, random_tokens, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.evaluation.cache_reference import ReferenceAttend
from optgptq.kernels import quantized_attention as plain
from optgptq.kernels.cache_choice import CacheChoice
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme, PastRule, SideScheme
from optgptq.kv_cache.setup import CacheSetup, LayerParameters, SideParameters
from optgptq.models.attention import context_at
from optgptq.models.decoder import load_decoder
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.scheduling.sampling_params import SamplingParams

VOCAB_SIZE = 61
# Heads of 8 or more features: groups of queries, one head for all, sliding windows, softcaps, ALiBi, learned positions.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-grouped_query": {"head_dim": 16},
    "llama-multi_query": {"head_dim": 8},
    "mistral-short_window": {"head_dim": 16},
    "gemma2-softcaps": {"head_dim": 16},
    "gemma3text-local_global": {"head_dim": 8},
    "bloom-six_heads": {"hidden_size": 48},
    "falcon-multi_query_alibi": {"hidden_size": 48},
    "opt-pre_norm": {},
    "phi3-longrope": {},
    "llama-rope_dynamic": {},
}
TORCH = CacheChoice(
    name="torch", reason="for tests", store=plain.store, attend=plain.attend, rows_are_independent=False
)
Outcome = tuple[list[int], list[Mapping[int, float]]]


def cached_model(name: str) -> TinyModel:
    """Return a tiny model whose heads can be quantized."""
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == name)
    return replace(tiny, values={**tiny.values, **FAMILIES[name]})


def write_cached_model(name: str, folder: Path) -> Path:
    """Write such a model and return the folder."""
    return save_reference(reference_model(cached_model(name)), folder)


def scheme_of(kind: str, head_dim: int) -> LayerScheme:
    """Return a scheme by name: `4/2` has two groups in a head of keys, `t16` has keys in groups of 16 tokens."""
    whole = {bits: SideScheme(bits=bits, group_size=head_dim) for bits in (2, 3, 4, 8)}
    return {
        "16": LayerScheme(keys=SideScheme(), values=SideScheme()),
        "8": LayerScheme(keys=whole[8], values=whole[8]),
        "3": LayerScheme(keys=whole[3], values=whole[3]),
        "4": LayerScheme(keys=whole[4], values=whole[4]),
        "K3V16": LayerScheme(keys=whole[3], values=SideScheme()),
        "K16V2": LayerScheme(keys=SideScheme(), values=whole[2]),
        "4/2": LayerScheme(keys=replace(whole[4], group_size=head_dim // 2), values=whole[4]),
        "t16": LayerScheme(keys=SideScheme(bits=4, group_size=16, axis="token"), values=whole[4]),
    }[kind]


def random_setup(
    spec: DecoderSpec, kinds: Sequence[str], past: PastRule, *, seed: int = 0, fitted: bool = False
) -> CacheSetup:
    """Return a setup with random parameters; the kinds of schemes take turns from layer to layer.

    `fitted`: codes are fitted to metrics, which is slow.
    """
    generator = torch.Generator().manual_seed(seed)
    schemes = tuple(scheme_of(kinds[index % len(kinds)], spec.head_dim) for index in range(spec.num_layers))
    layers = tuple(
        LayerParameters(
            keys=_side(spec, generator, shifts=spec.attention_softcap is None, fitted=fitted),
            values=_side(spec, generator, fitted=fitted),
        )
        for _ in schemes
    )
    fingerprint = sha256(repr((schemes, seed)).encode()).digest()
    return CacheSetup(
        scheme=CacheScheme(layers=schemes, past=past), layers=layers, fingerprint=fingerprint, source="a test"
    )


def _side(spec: DecoderSpec, generator: torch.Generator, *, fitted: bool, shifts: bool = True) -> SideParameters:
    heads, size = spec.num_kv_heads, spec.head_dim
    factor_KDD = torch.randn(heads, size, size, generator=generator)
    scale_KD = torch.rand(heads, size // 2, generator=generator).add(0.5).repeat(1, 2)
    return SideParameters(
        shift_KD=0.3 * torch.randn(heads, size, generator=generator) if shifts else None,
        scale_KD=scale_KD,
        rotation_KDD=torch.linalg.qr(factor_KDD)[0].contiguous(),
        metric_KDD=factor_KDD @ factor_KDD.mT + size * torch.eye(size) if fitted else None,
        ranges_C2=torch.tensor([[1.0, 1.0], [0.9, 0.95]]),
    )


def cached_engine(folder: Path, setup: CacheSetup | None, *, dtype: Any = torch.float32, **settings: Any) -> Engine:
    """Return an engine on the model in a folder."""
    wanted = {"page_size": 16, "max_running": 4, "max_length": 96, **settings}
    decoder = load_decoder(CheckpointFolder.open(folder), dtype=dtype)
    return Engine(decoder, None, EngineSettings(**wanted), setup)


def prompts_of(*sizes: int) -> list[list[int]]:
    """Return random prompts."""
    return [random_tokens(1, size, vocab_size=VOCAB_SIZE, seed=size)[0].tolist() for size in sizes]


def outcomes(engine: Engine, prompts: Sequence[list[int]], *, num_new: int = 12, **params: Any) -> list[Outcome]:
    """Return tokens and logprobs of greedy texts that are written together; with `n`, those of all texts."""
    values = {"max_tokens": num_new, "ignore_eos": True, "logprobs": 3, "temperature": 0.0, **params}
    names = [engine.submit(prompt, SamplingParams(**values)) for prompt in prompts]
    results = {}
    while engine.has_work:
        engine.step()
        results.update(engine.take_results())
    assert all(result.error is None for result in results.values())
    return [(text.token_ids, text.logprobs or []) for name in names for text in results[name].outputs]


@torch.inference_mode()
def reference_logprobs(
    engine: Engine, text: list[int], begins: Sequence[int], *, num_prompt_tokens: int, seen_from: int = 0
) -> torch.Tensor:
    """Return log probabilities `[S, V]` of a text whose keys are read as the engine's cache says."""
    decoder, plan = engine.decoder, engine.cache
    attend = None if plan is None else ReferenceAttend(plan=plan, begins=begins, seen_from=seen_from)
    positions, lengths = torch.arange(len(text)), None
    if "dynamic" in {rope.kind for rope in decoder.spec.ropes}:
        lengths = (positions + 1).clamp(min=num_prompt_tokens)
    context = context_at(decoder.spec, positions, dtype=decoder.dtype, attend=attend, lengths=lengths)
    hidden_BSM = decoder.hidden(torch.tensor([text]), context)
    return torch.log_softmax(decoder.head.logits(hidden_BSM[0]).double(), dim=-1)


def logprob_errors(
    engine: Engine,
    prompt: list[int],
    outcome: Outcome,
    *,
    step_tokens: int | None = None,
    begins: Sequence[int] | None = None,
    seen_from: int = 0,
) -> list[float]:
    """Return how far the logprobs of each token of a greedy text are from those of `ReferenceAttend`.

    Where texts depend on steps: `step_tokens` of the prompt, or where the step of each position `begins`,
    and from where on a prefix that was found is `seen_from` exact pages.
    """
    tokens, logprobs = outcome
    text = prompt + tokens[:-1]
    size = step_tokens or 1
    if begins is None:
        begins = [place - place % size if place < len(prompt) else place for place in range(len(text))]
    scored = reference_logprobs(engine, text, begins, num_prompt_tokens=len(prompt), seen_from=seen_from)
    expected_SV = scored[len(prompt) - 1 :]
    return [
        max(abs(float(row_V[token]) - found) for token, found in place.items())
        for row_V, place in zip(expected_SV, logprobs, strict=True)
    ]


def agree(errors: Sequence[float]) -> bool:
    """Whether texts are alike but for rounding, which moves a number to the next code now and then."""
    return median(errors) < 1e-3 and max(errors) < 0.1
