"""In deterministic mode tokens and logprobs of a request are the same bits, whatever the engine does besides."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import TINY_MODELS, random_tokens, reference_model, save_reference

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.kernels import paged_attention as plain
from optgptq.kernels.attention_choice import AttentionChoice
from optgptq.models.decoder import load_decoder
from optgptq.native.library import load_library
from optgptq.runtime import row_blocks, start
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.row_blocks import rows_are_independent
from optgptq.scheduling.sampling_params import SamplingParams

NEW = 9
SHARED = random_tokens(1, 19, seed=7)[0].tolist()
PROMPTS = (
    random_tokens(1, 3, seed=1)[0].tolist(),
    SHARED,
    [*SHARED, *random_tokens(1, 14, seed=2)[0].tolist()],
    random_tokens(1, 58, seed=3)[0].tolist(),
    [*SHARED[:9], 4, 5],
)
GREEDY = {"max_tokens": NEW, "ignore_eos": True, "logprobs": 2, "temperature": 0.0}
DRAWN = GREEDY | {"temperature": 1.5, "top_p": 0.9, "seed": 3}
PARAMS = tuple(SamplingParams(**(DRAWN if number % 2 else GREEDY)) for number in range(len(PROMPTS)))
PLAIN = AttentionChoice(
    name="torch",
    reason="for tests",
    store=plain.store_tokens,
    attend=plain.paged_attention,
    rows_are_independent=False,
)
Outcome = tuple[list[int], list[Mapping[int, float]]]


class Case:
    """A model with one kind of attention, and what each request gives alone."""

    def __init__(self, name: str, dtype: torch.dtype, folder: Any) -> None:
        if name == "story-llama":
            folder = bundled_path("bundled:story-llama")
        else:
            save_reference(reference_model(next(tiny for tiny in TINY_MODELS if tiny.name == name)), folder)
        self._load = partial(load_decoder, CheckpointFolder.open(folder), dtype=dtype)
        # As many texts as there are prompts, each with its own memory.
        self.alone = [self.run([number])[0] for number in range(len(PROMPTS))]

    def run(self, numbers: list[int], **settings: Any) -> list[Outcome]:
        """Return tokens and logprobs of some requests, run together."""
        engine = self.engine(**settings)
        names = [engine.submit(PROMPTS[number], PARAMS[number]) for number in numbers]
        results = {}
        while engine.has_work:
            engine.step()
            results.update(engine.take_results())
        texts = [results[name].outputs[0] for name in names]
        return [(text.token_ids, text.logprobs or []) for text in texts]

    def engine(self, **settings: Any) -> Engine:
        """Return a deterministic engine."""
        wanted = {"page_size": 8, "max_running": 4, "max_length": 80, "deterministic": True, **settings}
        return Engine(self._load(), None, EngineSettings(**wanted))


@pytest.fixture(
    scope="module",
    params=[
        ("story-llama", torch.float32, "native"),
        ("story-llama", torch.bfloat16, "native"),
        ("llama-grouped_query", torch.float32, "native"),
        ("llama-grouped_query", torch.bfloat16, "native"),
        ("llama-grouped_query", torch.float32, "torch"),
        ("gemma2-softcaps", torch.bfloat16, "torch"),
        ("gemma3text-local_global", torch.float32, "native"),
        ("bloom-six_heads", torch.float32, "torch"),
        ("phi3-longrope", torch.float32, "native"),
        ("llama-rope_dynamic", torch.bfloat16, "native"),
    ],
    ids=lambda values: f"{values[0]}-{values[1]}-{values[2]}",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    name, dtype, attention = request.param
    if attention == "native" and load_library() is None:
        pytest.skip("the native library was not built")
    with pytest.MonkeyPatch.context() as patch:
        if attention == "torch":
            patch.setattr(start, "choose_attention", lambda *what: PLAIN)
        yield Case(name, dtype, tmp_path_factory.mktemp("tiny"))


@settings(max_examples=6, deadline=None)
@given(
    numbers=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=6),
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
    plan = case.engine(max_running=1, max_step_tokens=7).runner.attend.pool.plan
    engine = case.engine(max_step_tokens=7, kv_cache_bytes=plan.num_bytes, watermark_ratio=0.0)
    names = [engine.submit(PROMPTS[number], PARAMS[number]) for number in (1, 2, 3, 0)]
    results = {}
    while engine.has_work:
        engine.step()
        results.update(engine.take_results())
    texts = [results[name].outputs[0] for name in names]
    assert [(text.token_ids, text.logprobs) for text in texts] == [case.alone[number] for number in (1, 2, 3, 0)]
    usage = engine.usage()
    assert usage.num_preemptions > 0
    assert usage.allocated_slots == 0


def test_a_machine_whose_rows_touch_each_other_takes_them_one_by_one(case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "rows_are_independent", lambda decoder, size, transforms: False)
    engine = case.engine()
    assert engine.runner.block_size == 1
    together = case.run([2, 0, 1])
    assert [tokens for tokens, _ in together] == [case.alone[number][0] for number in (2, 0, 1)]
    monkeypatch.undo()
    assert case.engine().runner.block_size == (16 if rows_are_independent(case.engine().decoder, 16) else 1)


def test_a_product_that_looks_at_other_rows_is_found_out(case) -> None:
    decoder = case.engine().decoder
    name, linear = next(iter(decoder.layers[-1].linears.items()))

    def mixing(x):
        output = linear(x)
        return output + 0.5 * output.mean(dim=-2, keepdim=True)

    decoder.layers[-1].linears[name] = mixing
    assert not rows_are_independent(decoder, 16)
