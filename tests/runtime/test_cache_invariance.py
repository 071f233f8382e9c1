"""Texts of a quantized cache that must not depend on steps, company, prefixes, preemption or forks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cached_engines import (
    TORCH,
    agree,
    cached_engine,
    logprob_errors,
    outcomes,
    prompts_of,
    random_setup,
    write_cached_model,
)
from support.tiny_models import random_tokens

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import UsageError
from optgptq.kv_cache.scheme import PastRule
from optgptq.models.registry import model_spec
from optgptq.runtime import start
from optgptq.scheduling.sampling_params import SamplingParams

NEW = 6
SHARED = random_tokens(1, 37, seed=7)[0].tolist()
PROMPTS = (*prompts_of(3), SHARED, [*SHARED, *random_tokens(1, 8, seed=2)[0].tolist()], [*SHARED[:17], 4, 5])
PASTS = {
    "off": PastRule(mode="off"),
    "token": PastRule(mode="token", sink_tokens=18),
    "window": PastRule(mode="window", window=24, sink_tokens=3),
    "recent": PastRule(mode="off", recent_tokens=7, sink_tokens=2),
}
CASES = [
    ("llama-grouped_query", "off", ["4"], "chosen"),
    ("llama-grouped_query", "window", ["t16", "K3V16"], "torch"),
    ("gemma3text-local_global", "token", ["4", "K16V2"], "chosen"),
    ("bloom-six_heads", "recent", ["8", "4"], "chosen"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def model(name: str):
        folder = write_cached_model(name, tmp_path_factory.mktemp("tiny"))
        return folder, model_spec(CheckpointFolder.open(folder))

    return model


class Case:
    """A model with a cache, and what each prompt gives alone."""

    def __init__(self, model, past: PastRule, kinds: list[str]) -> None:
        self.folder, spec = model
        self.setup = random_setup(spec, kinds, past)
        self.alone = [self.run([number])[0] for number in range(len(PROMPTS))]

    def engine(self, **changes):
        return cached_engine(self.folder, self.setup, **{"deterministic": True, **changes})

    def run(self, numbers: list[int], **changes):
        return outcomes(self.engine(**changes), [PROMPTS[number] for number in numbers], num_new=NEW)


@pytest.fixture(scope="module", params=CASES, ids=lambda values: "-".join([*values[:2], *values[2], values[3]]))
def case(request: pytest.FixtureRequest, models):
    name, mode, kinds, kernel = request.param
    with pytest.MonkeyPatch.context() as patch:
        if kernel == "torch":
            patch.setattr(start, "choose_cache_attention", lambda *what: TORCH)
        yield Case(models(name), PASTS[mode], kinds)


@settings(max_examples=3, deadline=None)
@given(
    numbers=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=5),
    max_step_tokens=st.integers(4, 70),
    prefix_cache=st.booleans(),
    num_texts=st.integers(1, 4),
)
def test_bits_are_the_same_in_any_company(case, numbers, max_step_tokens, prefix_cache, num_texts) -> None:
    """Memory for one text of the greatest length makes several of them push each other out."""
    plan = case.engine(max_running=num_texts, max_step_tokens=max_step_tokens).runner.attend.pool.plan
    found = case.run(numbers, max_step_tokens=max_step_tokens, prefix_cache=prefix_cache, kv_cache_bytes=plan.num_bytes)
    assert found == [case.alone[number] for number in numbers]


def test_texts_that_push_each_other_out(case) -> None:
    """Memory for one text of 48 tokens: three begin in a page each, and grow."""
    prompts = prompts_of(13, 14, 15)
    sizes = {"max_length": 48, "max_step_tokens": 20, "prefix_cache": False}
    expected = [outcomes(case.engine(**sizes), [prompt], num_new=6)[0] for prompt in prompts]
    room = case.engine(max_running=1, **sizes).runner.attend.pool.plan.num_bytes
    engine = case.engine(kv_cache_bytes=room, watermark_ratio=0.0, **sizes)
    assert outcomes(engine, prompts, num_new=6) == expected
    usage = engine.usage()
    assert usage.num_preemptions > 0
    assert usage.allocated_slots == 0


def test_a_prefix_that_is_found_gives_the_bits_of_a_cold_run(case) -> None:
    engine = case.engine()
    assert outcomes(engine, [PROMPTS[1]], num_new=NEW) == [case.alone[1]]
    before = engine.usage().prefix_hit_tokens
    assert outcomes(engine, [PROMPTS[2]], num_new=NEW) == [case.alone[2]]
    assert engine.usage().prefix_hit_tokens - before == 32
    assert outcomes(engine, [PROMPTS[3]], num_new=NEW) == [case.alone[3]]
    assert engine.usage().prefix_hit_tokens - before == 48


def test_several_texts_of_a_prompt_are_each_what_they_are_alone(case) -> None:
    """Their last page is shared when it is partly filled: each copies it before it writes, codes and exact numbers."""
    several = {"n": 3, "temperature": 1.5, "seed": 5}
    (found, expected) = (
        outcomes(case.engine(max_step_tokens=size), [SHARED], num_new=13, **several) for size in (64, 11)
    )
    assert found == expected
    texts = [tokens for tokens, _ in found]
    assert len({tuple(tokens) for tokens in texts}) == 3
    # Each text again as a prompt: what it stores of the others' shared page is its own.
    engine = case.engine()
    for tokens, logprobs in found:
        prompt = [*SHARED, *tokens[:11]]
        ((_, again),) = outcomes(engine, [prompt], num_new=1)
        assert all(again[0].get(token, value) == value for token, value in logprobs[11].items())


@pytest.mark.parametrize("past", [PastRule(), PastRule(recent_tokens=21, sink_tokens=5)], ids=["plain", "recent"])
def test_a_prefix_is_valid_in_chunk_mode(models, past) -> None:
    """Not the bits of a cold run: what was a step of its own is read from codes, its last tokens too."""
    folder, spec = models("llama-grouped_query")
    setup = random_setup(spec, ["3"], past)
    engine = cached_engine(folder, setup, max_step_tokens=70)
    outcomes(engine, [SHARED])
    prompt = list(PROMPTS[2])
    (outcome,) = outcomes(engine, [prompt])
    assert engine.usage().prefix_hit_tokens == 32
    text = prompt + outcome[0][:-1]
    begins = [0] * 32 + [32] * (len(prompt) - 32) + list(range(len(prompt), len(text)))
    assert agree(logprob_errors(engine, prompt, outcome, begins=begins, seen_from=32))
    cold = cached_engine(folder, setup, max_step_tokens=70, prefix_cache=False)
    assert outcomes(cold, [prompt])[0][1] != outcome[1]


def test_deterministic_steps_refuse_what_depends_on_them(models) -> None:
    folder, spec = models("llama-grouped_query")
    setup = random_setup(spec, ["4"], PastRule(mode="chunk"))
    with pytest.raises(UsageError) as caught:
        cached_engine(folder, setup, deterministic=True)
    assert caught.value.where == "deterministic"
    assert "past-only mode chunk" in caught.value.found
    assert "token or window:N" in caught.value.action
    assert cached_engine(folder, setup, deterministic=True, past_only="window:16").cache.past.name == "window:16"


@pytest.mark.parametrize("mode", ["token", "window:24", "chunk"])
def test_codes_of_a_token_are_read_from_the_next_step_on(models, mode) -> None:
    """Bytes of the step's own token change nothing in it; those of the past do."""
    folder, spec = models("llama-grouped_query")
    engine = cached_engine(folder, random_setup(spec, ["4"], PastRule()), past_only=mode)
    plain = cached_engine(folder, random_setup(spec, ["4"], PastRule()), past_only=mode)
    window = engine.cache.past.window or 1
    engine.runner.attend.cache.choice = _corrupting(engine.runner.attend.cache.choice, position=40)
    prompts = prompts_of(38)
    found, expected = outcomes(engine, prompts, num_new=20)[0], outcomes(plain, prompts, num_new=20)[0]
    # The step of a position gives the logprobs of the next one; those of position 38 come first.
    first = 41 if window == 1 else (40 // window + 1) * window
    same = first - 37
    assert found[1][:same] == expected[1][:same]
    assert found[1][same] != expected[1][same]


def _corrupting(choice, *, position: int):
    """Return kernels that write other bytes over the codes of the token at a position when it was stored."""

    def store(key_TKD, value_TKD, storage, batch) -> None:
        choice.store(key_TKD, value_TKD, storage, batch)
        if batch.pages.max_query == 1 and int(batch.pages.context_R[0]) == position + 1:
            page, place = divmod(int(batch.pages.slot_T[0]), storage.layout.page_size)
            heads_KB = storage.pages_ZB[page].view(storage.layout.num_kv_heads, -1)
            size = storage.layout.key_row_bytes
            heads_KB[:, place * size : (place + 1) * size] ^= 0x77

    return replace(choice, store=store)


def test_a_model_in_float64_runs(models) -> None:
    folder, spec = models("llama-grouped_query")
    engine = cached_engine(folder, random_setup(spec, ["4"], PASTS["window"]), dtype=torch.float64)
    name = engine.submit(PROMPTS[2], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert dict(engine.take_results())[name].error is None
