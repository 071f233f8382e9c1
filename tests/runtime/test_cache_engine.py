"""Engines with quantized caches beside `ReferenceAttend`, which knows no pages, steps or kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import median

import pytest
import torch
from support.cached_engines import (
    FAMILIES,
    TORCH,
    agree,
    cached_engine,
    logprob_errors,
    outcomes,
    prompts_of,
    random_setup,
    write_cached_model,
)

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.kv_cache.scheme import LayerScheme, PastRule
from optgptq.kv_cache.transform import HeadTransform
from optgptq.models.registry import model_spec
from optgptq.runtime import start

SIZES = (3, 21, 40, 16)
PASTS = {
    "off": PastRule(mode="off"),
    "token": PastRule(mode="token", sink_tokens=2),
    "window": PastRule(mode="window", window=24, sink_tokens=5),
    "recent": PastRule(mode="token", recent_tokens=9),
}
KINDS = ["4", "K3V16", "16", "4/2", "K16V2", "8"]


# Every family with one mode, every mode with a model whose layers have different windows.
FAMILY_MODES = [(name, list(PASTS)[number % len(PASTS)]) for number, name in enumerate(FAMILIES)]
FAMILY_MODES += [
    ("gemma3text-local_global", mode) for mode in PASTS if ("gemma3text-local_global", mode) not in FAMILY_MODES
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def model(name: str):
        folder = write_cached_model(name, tmp_path_factory.mktemp("tiny"))
        return folder, model_spec(CheckpointFolder.open(folder))

    return model


@pytest.mark.parametrize(("name", "mode"), FAMILY_MODES)
def test_texts_in_company_are_those_of_the_definition(models, name, mode) -> None:
    """Prompts in chunks beside texts that are written, in layers of several schemes; steps make no difference."""
    folder, spec = models(name)
    engine = cached_engine(folder, random_setup(spec, KINDS, PASTS[mode], fitted=True), max_step_tokens=13)
    prompts = prompts_of(*SIZES)
    for prompt, outcome in zip(prompts, outcomes(engine, prompts), strict=True):
        assert agree(logprob_errors(engine, prompt, outcome))


@pytest.mark.parametrize(
    ("name", "recent"), [("llama-grouped_query", 0), ("gemma2-softcaps", 9), ("bloom-six_heads", 17)]
)
def test_a_chunk_is_exact_to_itself(models, name, recent) -> None:
    folder, spec = models(name)
    setup = random_setup(spec, KINDS, PastRule(mode="chunk", sink_tokens=3, recent_tokens=recent))
    engine = cached_engine(folder, setup, max_step_tokens=13, prefix_cache=False)
    for prompt in prompts_of(*SIZES):
        (outcome,) = outcomes(engine, [prompt])
        assert agree(logprob_errors(engine, prompt, outcome, step_tokens=13))
    # With other steps it is another text, where the last tokens are not exact in any case.
    assert recent or median(logprob_errors(engine, prompts_of(40)[0], outcomes(engine, prompts_of(40))[0])) > 1e-3


@pytest.mark.parametrize("mode", ["token", "window", "chunk"])
def test_groups_along_tokens(models, mode) -> None:
    folder, spec = models("llama-grouped_query")
    past = PastRule(mode=mode, window=40 if mode == "window" else 0, sink_tokens=3)
    engine = cached_engine(folder, random_setup(spec, ["t16", "4"], past), max_step_tokens=13, prefix_cache=False)
    assert engine.cache is not None
    assert engine.cache.past.granule == 16
    prompts = prompts_of(*SIZES)
    found = [outcomes(engine, [prompt])[0] for prompt in prompts]
    for prompt, outcome in zip(prompts, found, strict=True):
        assert agree(logprob_errors(engine, prompt, outcome, step_tokens=13))
    if mode != "chunk":
        together = outcomes(engine, prompts)
        assert [tokens for tokens, _ in together] == [tokens for tokens, _ in found]


@pytest.mark.parametrize(("name", "mode"), [*FAMILY_MODES, ("llama-grouped_query", "chunk")])
def test_sixteen_bits_through_the_same_code_are_the_plain_cache(models, name, mode, monkeypatch) -> None:
    folder, spec = models(name)
    prompts = prompts_of(*SIZES)
    expected = outcomes(cached_engine(folder, None, max_step_tokens=13), prompts)
    setup = random_setup(spec, ["16"], PASTS.get(mode, PastRule(mode="chunk")))
    with monkeypatch.context() as patch:
        patch.setattr(LayerScheme, "is_exact", property(lambda scheme: False))
        engine = cached_engine(folder, setup, max_step_tokens=13)
    assert all(engine.cache.layouts)
    found = outcomes(engine, prompts)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    # Without the patch nothing of such a setup is quantized.
    assert cached_engine(folder, setup).cache is None


@pytest.mark.parametrize("name", ["mistral-short_window", "falcon-multi_query_alibi"])
def test_the_torch_kernel_and_the_chosen_one_agree(models, name, monkeypatch) -> None:
    folder, spec = models(name)
    setup = random_setup(spec, KINDS, PASTS["window"])
    prompts = prompts_of(*SIZES)
    chosen = outcomes(cached_engine(folder, setup, max_step_tokens=13), prompts)
    monkeypatch.setattr(start, "choose_cache_attention", lambda *what: TORCH)
    found = outcomes(cached_engine(folder, setup, max_step_tokens=13), prompts)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in chosen]


def test_a_broken_scale_is_seen(models) -> None:
    """Mutation: a scale of queries that is not that of the keys."""
    folder, spec = models("llama-grouped_query")
    engine = cached_engine(folder, random_setup(spec, ["8"], PASTS["token"]))
    (prompt,) = prompts_of(41)
    (outcome,) = outcomes(engine, [prompt])
    assert agree(logprob_errors(engine, prompt, outcome))
    engine = cached_engine(folder, random_setup(spec, ["8"], PASTS["token"]))
    attend = engine.runner.attend.cache
    first, right, last = attend.transforms
    scale_KD = right.keys.scale_KD.clone()
    scale_KD[0, 3] *= 3
    wrong = _Mixed(replace(right, keys=replace(right.keys, scale_KD=scale_KD)), right)
    attend.transforms = (first, wrong, last)
    (outcome,) = outcomes(engine, [prompt])
    assert median(logprob_errors(engine, prompt, outcome)) > 1e-3


class _Mixed:
    """Queries of one transform, all else of another."""

    def __init__(self, first: HeadTransform, second: HeadTransform) -> None:
        self.query = first.query
        self.key, self.value, self.output = second.key, second.value, second.output


def test_bfloat16_beside_the_definition(models) -> None:
    folder, spec = models("llama-grouped_query")
    engine = cached_engine(folder, random_setup(spec, ["8"], PASTS["window"]), dtype=torch.bfloat16)
    prompts = prompts_of(*SIZES)
    for prompt, outcome in zip(prompts, outcomes(engine, prompts), strict=True):
        assert median(logprob_errors(engine, prompt, outcome)) < 0.05
