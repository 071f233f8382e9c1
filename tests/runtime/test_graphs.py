"""Decode steps through buckets, with a recorder that runs what it was given each time: no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import TINY_MODELS, random_tokens, reference_model, save_reference

from optgptq.bundled import bundled_path
from optgptq.kernels.attention_choice import choose_attention
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.graphs import Bucket, DecodeGraphs, bucket_of
from optgptq.runtime.llm import generate
from optgptq.runtime.load import load_model
from optgptq.runtime.runner import Runner
from optgptq.scheduling.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = [random_tokens(1, size, vocab_size=1024, seed=size)[0].tolist() for size in (3, 17, 40, 5, 9)]


def engine_with(capture) -> Engine:
    engine = Engine(load_model(bundled_path("bundled:story-llama")), None, EngineSettings(max_length=64, max_running=8))
    pool = engine.runner.attend.pool
    attention = choose_attention(torch.device("cpu"), torch.float32, engine.decoder.spec.head_dim)
    engine.runner = Runner.start(engine.decoder, pool, attention, capture=capture)
    return engine


def run_each_time(run):
    return run


def test_buckets_grow_in_steps():
    rows = [bucket_of(count, 5, max_length=4096).rows for count in (1, 2, 3, 5, 8, 9, 17, 33)]
    assert rows == [1, 2, 4, 8, 8, 16, 24, 40]
    contexts = [bucket_of(1, context, max_length=10_000).context for context in (1, 1024, 1025, 4097, 9_999)]
    assert contexts == [1024, 1024, 4096, 10_000, 10_000]
    assert bucket_of(1, 5, max_length=64) == Bucket(1, 64)


def test_padded_steps_give_the_same_tokens_and_write_only_to_the_reserved_page():
    plain, padded = engine_with(None), engine_with(run_each_time)
    for pages in padded.runner.attend.pool.layers:
        pages.keys_ZKDY.fill_(float("nan"))
        pages.values_ZKYD.fill_(float("nan"))
    expected = [result.token_ids for result in generate(plain, PROMPTS, GREEDY)]
    assert [result.token_ids for result in generate(padded, PROMPTS, GREEDY)] == expected
    assert plain.runner.graphs is None
    graphs = padded.runner.graphs
    assert isinstance(graphs, DecodeGraphs)
    # Five texts need a bucket of eight rows; three rows were padded.
    assert Bucket(8, 64) in graphs.buckets
    for pages in padded.runner.attend.pool.layers:
        slots_ZY = (~torch.isnan(pages.keys_ZKDY)).any(dim=2).any(dim=1)
        # The last new token of a text is never read. Page 0 has the one slot of the padded rows.
        assert int(slots_ZY[1:].sum()) == sum(len(prompt) + 11 for prompt in PROMPTS)
        assert slots_ZY[0].tolist() == [True] + [False] * 15


@pytest.mark.parametrize("past_only", ["token", "window:24", "chunk", "off"])
def test_padded_steps_of_a_quantized_cache(past_only):
    settings = EngineSettings(max_length=64, max_running=8, kv_cache="4", past_only=past_only)
    expected, padded = (Engine(load_model(bundled_path("bundled:story-llama")), None, settings) for _ in range(2))
    wanted = [result.token_ids for result in generate(expected, PROMPTS, GREEDY)]
    attend = padded.runner.attend
    for pages in attend.pool.layers:
        # NaN as scales and minimums, so that codes that nobody wrote would be seen.
        pages.pages_ZB.fill_(0xFF)
        pages.exact_keys_ZKDY.fill_(float("nan"))
        pages.exact_values_ZKYD.fill_(float("nan"))
    padded.runner = Runner.start(
        padded.decoder, attend.pool, attend.attention, cache=attend.cache, capture=run_each_time
    )
    assert [result.token_ids for result in generate(padded, PROMPTS, GREEDY)] == wanted
    graphs = padded.runner.graphs
    assert Bucket(8, 64) in graphs.buckets
    for recorded in graphs.buckets.values():
        assert recorded.batch.first_exact_T.dtype == torch.int32
        assert len(recorded.batch.groups) == 2


def test_each_bucket_is_recorded_once():
    recorded = []

    def count(run):
        recorded.append(run)
        return run

    engine = engine_with(count)
    generate(engine, PROMPTS, GREEDY)
    generate(engine, PROMPTS, GREEDY)
    assert len(recorded) == len(engine.runner.graphs.buckets) <= 4


def test_without_memory_to_record_a_step_runs_as_it_is(caplog):
    def refuse(run):
        raise torch.OutOfMemoryError("no memory")

    expected = [result.token_ids for result in generate(engine_with(None), PROMPTS, GREEDY)]
    assert [result.token_ids for result in generate(engine_with(refuse), PROMPTS, GREEDY)] == expected
    assert "run unrecorded" in caplog.text
    assert caplog.text.count("8 texts") == 1


def test_frequencies_that_depend_on_the_length_are_not_recorded_and_it_is_said(tmp_path, caplog):
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == "llama-rope_dynamic")
    decoder = load_model(save_reference(reference_model(tiny), tmp_path))
    engine = Engine(decoder, None, EngineSettings(max_length=32, max_running=2))
    attention = choose_attention(torch.device("cpu"), torch.float32, decoder.spec.head_dim)
    runner = Runner.start(engine.decoder, engine.runner.attend.pool, attention, capture=run_each_time)
    assert runner.graphs is None
    assert "decode steps are not recorded" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_steps_on_a_gpu():
    prompts = PROMPTS[:3]
    results = []
    for graphs in (True, False):
        decoder = load_model(bundled_path("bundled:story-llama"), dtype=torch.bfloat16, device="cuda")
        engine = Engine(decoder, None, EngineSettings(max_length=64, max_running=8, graphs=graphs))
        results.append([result.token_ids for result in generate(engine, prompts, GREEDY)])
    assert results[0] == results[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("past_only", ["token", "window:24", "chunk"])
def test_recorded_steps_of_a_quantized_cache_on_a_gpu(past_only):
    results = []
    for graphs in (True, False):
        decoder = load_model(bundled_path("bundled:story-llama"), dtype=torch.bfloat16, device="cuda")
        settings = EngineSettings(max_length=64, max_running=8, graphs=graphs, kv_cache="4", past_only=past_only)
        engine = Engine(decoder, None, settings)
        assert (engine.runner.graphs is not None) == graphs
        results.append([result.token_ids for result in generate(engine, PROMPTS[:3], GREEDY)])
    assert results[0] == results[1]
