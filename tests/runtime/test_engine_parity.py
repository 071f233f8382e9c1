"""The engine writes what transformers' `generate` writes, token by token, for every family and however it is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import TINY_MODELS, random_tokens, reference_greedy, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.models.decoder import load_decoder
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.llm import generate
from optgptq.scheduling.sampling_params import SamplingParams

NEW = 20
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
# On both sides of the sliding windows, of `dynamic`'s 16 positions, of longrope's 64, and of pages.
SIZES = (3, 12, 61, 16)


@pytest.fixture(scope="module", params=TINY_MODELS, ids=lambda tiny: tiny.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    model = reference_model(request.param)
    folder = save_reference(model, tmp_path_factory.mktemp("tiny"))
    prompts = [random_tokens(1, size, seed=size)[0].tolist() for size in SIZES]
    return folder, prompts, [reference_greedy(model, prompt, NEW) for prompt in prompts]


def engine_of(folder: Path, **settings: object) -> Engine:
    wanted = {"page_size": 8, "max_running": 8, "max_length": 128, **settings}
    return Engine(load_decoder(CheckpointFolder.open(folder)), None, EngineSettings(**wanted))


def tokens(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    results = generate(engine, prompts, GREEDY)
    assert all(result.error is None for result in results)
    return [result.token_ids for result in results]


def test_alone_batched_and_with_prefix_hits(case) -> None:
    folder, prompts, expected = case
    engine = engine_of(folder)
    assert [tokens(engine, [prompt])[0] for prompt in prompts] == expected
    hits = engine.usage().prefix_hit_tokens
    assert tokens(engine, prompts) == expected
    assert engine.usage().prefix_hit_tokens > hits


def test_in_chunks_and_with_preemption(case) -> None:
    folder, prompts, expected = case
    # Room for one text of 96 tokens. Several fit while they are short; they grow to 23, 32, 81 and 36 tokens.
    tight = {"max_step_tokens": 11, "max_length": 96, "watermark_ratio": 0.0, "prefix_cache": False}
    room = engine_of(folder, max_running=1, **tight).runner.attend.pool.plan.num_bytes
    engine = engine_of(folder, kv_cache_bytes=room, **tight)
    assert tokens(engine, prompts) == expected
    usage = engine.usage()
    assert usage.num_preemptions > 0
    assert usage.allocated_slots == 0
    # The longest prompt alone takes six steps.
    assert usage.num_steps > NEW + 5


def test_deterministic_blocks(case) -> None:
    folder, prompts, expected = case
    assert tokens(engine_of(folder, deterministic=True), prompts) == expected
