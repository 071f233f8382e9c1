"""Plans of memory: never more than the budget, always room for a text of the greatest length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantizable import tiny_model, write_model
from support.tiny_models import TINY_MODELS, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import CapacityError, ModelError
from optgptq.models.decoder import load_decoder
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.layer_groups import plain_page_bytes
from optgptq.runtime.memory_plan import DEFAULT_LENGTH, MemoryPlan, plan_memory
from optgptq.runtime.start import scheduler_settings
from optgptq.scheduling.request import Request
from optgptq.scheduling.sampling_params import SamplingParams
from optgptq.scheduling.scheduler import Scheduler

NUMBER_BYTES = 2


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == "llama-grouped_query")
    return model_spec(CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path_factory.mktemp("tiny"))))


def with_windows(spec: DecoderSpec, *windows: int | None) -> DecoderSpec:
    return replace(spec, layers=tuple(replace(spec.layers[0], sliding_window=window) for window in windows))


def plan_of(spec: DecoderSpec, budget: int, **changes: int | None) -> MemoryPlan:
    values = {"page_size": 8, "max_length": 64, "max_running": 4, "max_step_tokens": 16, **changes}
    page_bytes = plain_page_bytes(spec, page_size=values["page_size"], number_bytes=NUMBER_BYTES)
    return plan_memory(spec, layer_page_bytes=page_bytes, budget_bytes=budget, **values)


def slot_bytes(spec: DecoderSpec) -> int:
    """Bytes of one token in one layer."""
    return 2 * spec.num_kv_heads * spec.head_dim * NUMBER_BYTES


@settings(max_examples=200, deadline=None)
@given(
    windows=st.lists(st.none() | st.integers(1, 90), min_size=1, max_size=4),
    budget=st.integers(0, 200_000),
    page_size=st.sampled_from([8, 16, 24]),
    max_length=st.none() | st.integers(2, 300),
    max_running=st.integers(1, 6),
    max_step_tokens=st.integers(6, 50),
)
def test_the_budget_is_kept_and_every_text_fits(spec, windows, budget, page_size, max_length, **limits) -> None:
    model = with_windows(spec, *windows)
    values = {"page_size": page_size, "max_length": max_length, **limits}
    try:
        plan = plan_of(model, budget, **values)
    except CapacityError:
        shortest = max_length or 2
        with pytest.raises(CapacityError):
            plan_of(model, budget, **{**values, "max_length": shortest, "max_running": 1})
        return
    assert plan.num_bytes <= budget
    assert plan.longest_texts >= 1
    assert plan.max_length == max_length or (max_length is None and 2 <= plan.max_length <= model.max_position)
    assert sorted(index for group in plan.groups for index in group.layers) == list(range(len(windows)))
    for group, pages in zip(plan.groups, plan.num_pages, strict=True):
        assert {model.layers[index].sliding_window for index in group.layers} == {group.window}
        assert group.page_bytes == slot_bytes(model) * page_size * len(group.layers)
        assert 1 <= group.pages_per_text <= -(-plan.max_length // page_size)
        assert pages <= group.pages_per_text * limits["max_running"] + 1
    _run_the_longest_text(plan, model, limits["max_running"], limits["max_step_tokens"])


def _run_the_longest_text(plan: MemoryPlan, spec: DecoderSpec, max_running: int, max_step_tokens: int) -> None:
    chosen = scheduler_settings(plan, spec, EngineSettings(), step_tokens=max_step_tokens, max_running=max_running)
    scheduler = Scheduler(chosen)
    assert scheduler.max_length == plan.max_length
    request = Request(
        request_id="longest",
        prompt_ids=(1,) * max(1, plan.max_length * 2 // 3),
        params=SamplingParams(max_tokens=None),
        arrival=0.0,
    )
    (text,) = scheduler.submit(request)
    while not text.is_finished:
        step = scheduler.schedule(0.0)
        assert step.parts or step.ended
        scheduler.complete(step, [1] * len(step.sampled))
    assert len(text.token_ids) == plan.max_length
    assert scheduler.usage().num_preemptions == 0


def test_pages_are_what_texts_can_use_and_no_more(spec) -> None:
    plan = plan_of(with_windows(spec, None, None), 10**9)
    assert (plan.num_pages, plan.longest_texts, plan.num_tokens) == ((4 * 8 + 1,), 4, 256)
    assert plan.num_bytes == 33 * 8 * 2 * slot_bytes(spec)
    assert plan.sentence().endswith("256 tokens in pages of 8; 4 texts of 64 tokens at once")


def test_windows_need_few_pages(spec) -> None:
    """Seven keys before the first new token, sixteen new ones: 22 positions touch four pages of eight at most."""
    plan = plan_of(with_windows(spec, 7, None, 7), 10**9)
    assert [(group.window, group.layers, group.pages_per_text) for group in plan.groups] == [
        (None, (1,), 8),
        (7, (0, 2), 4),
    ]
    assert plan.num_pages == (33, 17)
    assert plan_of(with_windows(spec, 7), 10**9, max_length=16).groups[0].pages_per_text == 2


def test_what_is_left_beyond_whole_texts_is_used(spec) -> None:
    model = with_windows(spec, None)
    page = 8 * slot_bytes(spec)
    plan = plan_of(model, (2 * 8 + 1 + 5) * page + page - 1)
    assert (plan.num_pages, plan.longest_texts) == ((22,), 2)


def test_the_length_shrinks_only_where_nobody_asked_for_it(spec) -> None:
    model, page = with_windows(spec, None), 8 * slot_bytes(spec)
    assert plan_of(model, 4 * page, max_length=None).max_length == 24
    message = (
        f"memory for keys and values: expected {9 * page:,} bytes for one text of 64 tokens, found {4 * page:,} bytes. "
        "Give more memory (kv_cache_bytes), or set max_length to 24 or less."
    )
    with pytest.raises(CapacityError) as caught:
        plan_of(model, 4 * page)
    assert str(caught.value) == message
    with pytest.raises(CapacityError, match="or use a smaller model"):
        plan_of(model, page)


@settings(max_examples=100, deadline=None)
@given(
    windows=st.lists(st.none() | st.integers(1, 90), min_size=1, max_size=4),
    page_size=st.sampled_from([8, 16, 24]),
    max_position=st.integers(2, 300),
)
def test_where_no_length_is_asked_for_the_least_that_works_is_named(spec, windows, page_size, max_position) -> None:
    model = replace(with_windows(spec, *windows), max_position=max_position)
    with pytest.raises(CapacityError) as caught:
        plan_of(model, 100, page_size=page_size, max_length=None)
    least = 2 * page_size * slot_bytes(model) * len(windows)
    shortest = min(page_size, max_position)
    assert caught.value.expected == f"{least:,} bytes for one text of {shortest} tokens"
    assert plan_of(model, least, page_size=page_size, max_length=None).max_length >= shortest
    with pytest.raises(CapacityError):
        plan_of(model, least - 1, page_size=page_size, max_length=None)


def test_the_length_is_the_models_promise(spec) -> None:
    assert plan_of(spec, 10**9, max_length=None).max_length == spec.max_position == 512
    assert plan_of(replace(spec, max_position=None), 10**9, max_length=None).max_length == DEFAULT_LENGTH
    learned = replace(spec, num_learned_positions=50, learned_offset=2)
    assert plan_of(learned, 10**9, max_length=None).max_length == 48


@pytest.mark.parametrize("name", ["llama-grouped_query", "gpt2-conv1d"])
def test_a_model_of_one_position_is_no_question_of_memory(name: str, tmp_path: Path) -> None:
    limit = {"n_positions" if name.startswith("gpt2") else "max_position_embeddings": 1}
    decoder = load_decoder(CheckpointFolder.open(write_model(tiny_model(name, **limit), tmp_path)))
    with pytest.raises(ModelError) as caught:
        Engine(decoder, None)
    assert str(caught.value) == (
        "config.json: expected at least 2 positions: a token to read and one to write, found 1 "
        "(max_position_embeddings, n_positions or max_seq_len). Write the number there that the model was trained with."
    )
    # Rotary frequencies go on for ever, a table of positions does not.
    if name.startswith("gpt2"):
        with pytest.raises(ModelError):
            Engine(decoder, None, EngineSettings(max_length=16))
    else:
        assert Engine(decoder, None, EngineSettings(max_length=16)).max_length == 16
