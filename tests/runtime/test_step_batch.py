"""Tensors of a step against a literal builder, through everything that happens to texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduled import SimulatedEngine, request
from support.scheduled import settings as scheduler_settings
from support.tiny_models import TINY_MODELS, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.kernels.paged_attention import PagedBatch
from optgptq.kv_cache.scheme import PastRule
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.row_blocks import block_parts
from optgptq.runtime.step_batch import StepBatch, StepTables, rope_lengths, token_batches
from optgptq.scheduling.step import StepPart

PAGE = 4


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DecoderSpec]:
    def spec_of(name: str) -> DecoderSpec:
        tiny = next(tiny for tiny in TINY_MODELS if tiny.name == name)
        return model_spec(CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path_factory.mktemp("tiny"))))

    names = {"none": "llama-grouped_query", "dynamic": "llama-rope_dynamic", "longrope": "phi3-longrope"}
    return {kind: spec_of(name) for kind, name in names.items()}


def check(batch: StepBatch, parts: list[StepPart], *, windows: tuple[int | None, ...], fill_to: int = 0) -> None:
    """Compare a batch with what is looked up token by token; pages are compared where they are seen."""
    tokens = [(part, position) for part in parts for position in range(part.begin, part.end)]
    num_missing = max(0, fill_to - len(tokens))
    expected = [part.sequence.token_ids[position] for part, position in tokens] + [0] * num_missing
    assert batch.token_T.tolist() == expected
    assert batch.position_T.tolist() == [position for _, position in tokens] + list(range(num_missing))
    ends = [row for row, (part, position) in enumerate(tokens) if part.samples and position == part.end - 1]
    assert batch.last_rows.tolist() == ends
    contexts = [part.end for part in parts] + [num_missing] * (num_missing > 0)
    counts = [part.end - part.begin for part in parts] + [num_missing] * (num_missing > 0)
    for number, (group, window) in enumerate(zip(batch.groups, windows, strict=True)):
        assert group.query_start_R1.tolist() == [sum(counts[:index]) for index in range(len(counts) + 1)]
        assert group.context_R.tolist() == contexts
        assert (group.max_query, group.max_context) == (max(counts), max(contexts))
        slots = [part.sequence.page_tables[number][place // PAGE] * PAGE + place % PAGE for part, place in tokens]
        assert group.slot_T.tolist() == slots + [place % PAGE for place in range(num_missing)]
        for row, part in enumerate(parts):
            first = 0 if window is None else max(0, part.begin - window + 1) // PAGE
            last = (part.end - 1) // PAGE + 1
            assert group.page_table_RP[row, first:last].tolist() == part.sequence.page_tables[number][first:last]
        assert not group.page_table_RP[len(parts) :].any()
        assert group.query_start_R1.dtype == group.context_R.dtype == group.page_table_RP.dtype == torch.int32
        assert group.slot_T.dtype == torch.int64


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 30), st.integers(1, 3)),
        st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0)),
    ),
    min_size=3,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(
    actions=ACTIONS,
    windows=st.sampled_from([(None,), (None, 6), (3,)]),
    num_pages=st.integers(9, 24),
    block_size=st.none() | st.integers(1, 7),
    restart_lengths=st.sampled_from([(), (17,), (9, 20)]),
)
def test_batches_are_those_of_a_literal_builder(specs, actions, windows, num_pages, block_size, restart_lengths):
    """Few pages make texts wait and come back; windows give pages back; forks copy them; lengths restart texts."""
    groups = [(num_pages, window) for window in windows]
    engine = SimulatedEngine(scheduler_settings(*groups, max_length=34, restart_lengths=restart_lengths))
    device = torch.device("cpu")
    tables = StepTables(spec=specs["none"], num_groups=len(windows), page_size=PAGE, device=device)
    for number, (action, amount, n) in enumerate(actions):
        if action == "submit":
            # Prompts of few different tokens share pages.
            prompt = [token % 2 for token in range(amount)]
            engine.submit(request(f"request {number}", prompt, n=n, max_tokens=9))
        elif action == "cancel":
            engine.scheduler.cancel(f"request {amount}", "cancelled")
        for _ in range(amount if action == "step" else 1):
            step = engine.schedule()
            blocks = [list(step.parts)] if block_size is None else list(block_parts(step.parts, block_size))
            for block in blocks if step.parts else ():
                batch = tables.batch(block, fill_to=block_size or 0)
                assert batch.length_T is None
                check(batch, block, windows=windows, fill_to=block_size or 0)
            engine.complete(step)


def test_rows_of_tables_grow_beyond_their_first_size(specs) -> None:
    engine = SimulatedEngine(scheduler_settings((200, None), max_length=700, max_step_tokens=300))
    tables = StepTables(spec=specs["none"], num_groups=1, page_size=PAGE, device=torch.device("cpu"))
    engine.submit(request("long", range(600), max_tokens=5))
    while engine.scheduler.has_work:
        step = engine.schedule()
        check(tables.batch(step.parts), list(step.parts), windows=(None,))
        engine.complete(step)


def test_lengths_that_decide_rotary_frequencies(specs) -> None:
    engine = SimulatedEngine(scheduler_settings((20, None)))
    (text,) = engine.submit(request("it", range(5)))
    text.token_ids += [1, 2, 3]
    parts = [StepPart(text, 2, 4, ()), StepPart(text, 4, 8, (text,))]
    assert rope_lengths(specs["none"], parts) is None
    # The prompt's length for the prompt, the length so far for each new token.
    assert rope_lengths(specs["dynamic"], parts).tolist() == [5, 5, 5, 6, 7, 8]
    assert rope_lengths(specs["longrope"], parts).tolist() == [8] * 6


def test_filled_up_rows_have_the_shortest_length(specs) -> None:
    engine = SimulatedEngine(scheduler_settings((20, None)))
    engine.submit(request("it", range(5)))
    step = engine.schedule()
    tables = StepTables(spec=specs["dynamic"], num_groups=1, page_size=PAGE, device=torch.device("cpu"))
    assert tables.batch(step.parts, fill_to=8).length_T.tolist() == [5, 5, 5, 5, 5, 1, 1, 1]


def test_first_exact_keys_of_parts_and_of_rows_that_fill_up(specs) -> None:
    engine = SimulatedEngine(scheduler_settings((20, None), max_step_tokens=20))
    engine.submit(request("long", range(11)))
    engine.submit(request("short", range(3)))
    step = engine.schedule()
    places = {"spec": specs["none"], "num_groups": 1, "page_size": PAGE, "device": torch.device("cpu")}
    assert StepTables(**places).batch(step.parts).first_exact_T is None
    for past, expected in (
        (PastRule(mode="token"), [*range(11), *range(3)]),
        (PastRule(mode="off"), [*range(1, 12), *range(1, 4)]),
        (PastRule(mode="chunk"), [0] * 14),
        (PastRule(mode="window", window=4), [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 0, 0, 0]),
    ):
        batch = StepTables(**places, past=past).batch(step.parts, fill_to=17)
        # Rows that fill up read no codes: those of the reserved page may be anything.
        assert batch.first_exact_T.tolist() == [*expected, 0, 0, 0]
        assert batch.first_exact_T.dtype == torch.int32
    # A block begins where it begins, in the middle of a part.
    late = StepPart(step.parts[0].sequence, 6, 9, ())
    tables = StepTables(**places, past=PastRule(mode="chunk"))
    assert tables.batch([late]).first_exact_T.tolist() == [6, 6, 6]


def test_a_batch_token_by_token() -> None:
    batch = PagedBatch(
        query_start_R1=torch.tensor([0, 1, 4], dtype=torch.int32),
        context_R=torch.tensor([7, 9], dtype=torch.int32),
        page_table_RP=torch.tensor([[3, 4, 0], [5, 6, 7]], dtype=torch.int32),
        slot_T=torch.tensor([18, 26, 27, 28]),
        max_query=3,
        max_context=9,
    )
    tokens = token_batches(batch)
    assert [(one.context_R.tolist(), one.max_context, one.max_query) for one in tokens] == [
        ([7], 7, 1),
        ([7], 7, 1),
        ([8], 8, 1),
        ([9], 9, 1),
    ]
    assert [one.page_table_RP.tolist() for one in tokens] == [[[3, 4, 0]], *[[[5, 6, 7]]] * 3]
    assert [one.slot_T.tolist() for one in tokens] == [[18], [26], [27], [28]]
    assert all(one.query_start_R1.tolist() == [0, 1] for one in tokens)
    assert token_batches(replace(batch, query_start_R1=torch.tensor([0]), context_R=torch.tensor([]))) == ()
