"""Plans of quantized caches: codes in their groups, exact pages of first and last tokens in a group of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import TINY_MODELS, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import CapacityError
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.scheme import USUAL_RECENT_TOKENS, USUAL_SINK_TOKENS, LayerScheme, PastRule, SideScheme
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.layer_groups import ExactPages, plain_page_bytes
from optgptq.runtime.memory_plan import MemoryPlan, plan_memory
from optgptq.runtime.start import scheduler_settings
from optgptq.scheduling.request import Request
from optgptq.scheduling.sampling_params import SamplingParams
from optgptq.scheduling.scheduler import Scheduler

PAGE = 16


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == "llama-grouped_query")
    return model_spec(CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path_factory.mktemp("tiny"))))


def shaped(spec: DecoderSpec, windows: tuple[int | None, ...], num_kv_heads: int, head_dim: int) -> DecoderSpec:
    layers = tuple(replace(spec.layers[0], sliding_window=window) for window in windows)
    return replace(spec, layers=layers, num_kv_heads=num_kv_heads, head_dim=head_dim)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with a quantized cache: the bits of each layer, 16 for one that stays as it is."""

    windows: tuple[int | None, ...]
    bits: tuple[int, ...]
    num_sinks: int
    window: int
    num_kv_heads: int = 2
    head_dim: int = 16
    max_length: int | None = 100
    max_running: int = 4
    max_step_tokens: int = 32
    forgets: bool = False

    def model(self, spec: DecoderSpec) -> DecoderSpec:
        return shaped(spec, self.windows, self.num_kv_heads, self.head_dim)

    def page_bytes(self, index: int) -> int:
        return page_bytes(self.bits[index], num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    def exact(self) -> ExactPages | None:
        layers = tuple(index for index, bits in enumerate(self.bits) if bits != 16)
        if not layers or (self.num_sinks == 0 and self.window == 0):
            return None
        plain = page_bytes(16, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        return ExactPages(
            num_sinks=self.num_sinks,
            window=self.window,
            layers=layers,
            page_bytes=plain * len(layers),
            forgets_window=self.forgets,
        )

    def plan(self, spec: DecoderSpec, budget: int) -> MemoryPlan:
        return plan_memory(
            self.model(spec),
            page_size=PAGE,
            layer_page_bytes=[self.page_bytes(index) for index in range(len(self.bits))],
            budget_bytes=budget,
            max_length=self.max_length,
            max_running=self.max_running,
            max_step_tokens=self.max_step_tokens,
            exact=self.exact(),
        )


def page_bytes(bits: int, *, num_kv_heads: int, head_dim: int) -> int:
    side = SideScheme() if bits == 16 else SideScheme(bits=bits, group_size=head_dim)
    layout = PageLayout(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=PAGE,
        scheme=LayerScheme(keys=side, values=side),
        exact_bytes=2,
    )
    return layout.page_bytes


CASES = st.integers(1, 4).flatmap(
    lambda count: st.builds(
        Case,
        windows=st.tuples(*[st.none() | st.integers(1, 90)] * count),
        bits=st.tuples(*[st.sampled_from([2, 3, 4, 8, 16])] * count),
        num_sinks=st.sampled_from([0, 1, 4, 17, 64]),
        window=st.sampled_from([0, 1, 20, 128]),
        max_length=st.none() | st.integers(2, 300),
        max_running=st.integers(1, 6),
        max_step_tokens=st.integers(6, 50),
        forgets=st.booleans(),
    )
)


@settings(max_examples=200, deadline=None)
@given(case=CASES, budget=st.integers(0, 300_000))
def test_the_budget_is_kept_and_a_text_fits(spec, case: Case, budget: int) -> None:
    try:
        plan = case.plan(spec, budget)
    except CapacityError:
        with pytest.raises(CapacityError):
            replace(case, max_length=case.max_length or 2, max_running=1).plan(spec, budget)
        return
    exact = case.exact()
    assert plan.num_bytes <= budget
    assert plan.longest_texts >= 1
    assert [group.is_exact for group in plan.groups] == [False] * (len(plan.groups) - bool(exact)) + [True] * bool(
        exact
    )
    codes = [group for group in plan.groups if not group.is_exact]
    assert sorted(index for group in codes for index in group.layers) == list(range(len(case.bits)))
    for group in codes:
        assert group.page_bytes == sum(map(case.page_bytes, group.layers))
    if exact is not None:
        last = plan.groups[-1]
        assert (last.layers, last.page_bytes, last.num_sinks) == (exact.layers, exact.page_bytes, exact.num_sinks)
        assert plan.num_pages[-1] <= 1 + last.step_pages + last.pages_per_text * case.max_running
        assert last.forgets_window == case.forgets
        assert (last.window and not case.forgets) or last.step_pages == 0
    _run_the_longest_text(plan, case, case.model(spec))


def _run_the_longest_text(plan: MemoryPlan, case: Case, model: DecoderSpec) -> None:
    chosen = scheduler_settings(
        plan, model, EngineSettings(), step_tokens=case.max_step_tokens, max_running=case.max_running
    )
    assert [group.num_sinks for group in chosen.groups] == [group.num_sinks for group in plan.groups]
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


@settings(max_examples=200, deadline=None)
@given(case=CASES, beyond=st.integers(0, 300_000), more=st.integers(0, 100_000))
def test_more_memory_or_fewer_bits_never_mean_less(spec, case: Case, beyond: int, more: int) -> None:
    case = replace(case, max_length=case.max_length or 100)
    budget = beyond + sum(group.fixed_bytes + group.text_bytes for group in case.plan(spec, 10**9).groups)
    plan = case.plan(spec, budget)
    larger = case.plan(spec, budget + more)
    assert all(after >= before for before, after in zip(plan.num_pages, larger.num_pages, strict=True))
    assert (larger.num_tokens, larger.longest_texts) >= (plan.num_tokens, plan.longest_texts)
    fewer = replace(case, bits=tuple(2 if bits == 8 else bits for bits in case.bits)).plan(spec, budget)
    assert fewer.num_tokens >= plan.num_tokens
    assert fewer.longest_texts >= plan.longest_texts


BYTES_PER_TOKEN = {
    # Layers, key/value heads, head size: bytes at 16, 8, 4, 3 and 2 bits with one group per head.
    (32, 32, 128): (524_288, 270_336, 139_264, 106_496, 73_728),
    (32, 8, 128): (131_072, 67_584, 34_816, 26_624, 18_432),
    (28, 4, 128): (57_344, 29_568, 15_232, 11_648, 8_064),
    (16, 8, 64): (32_768, 17_408, 9_216, 7_168, 5_120),
}


def large(shape: tuple[int, int, int], bits: int, *, num_sinks: int = 0, window: int = 0, **more: Any) -> Case:
    layers, num_kv_heads, head_dim = shape
    return Case(
        windows=(None,) * layers,
        bits=(bits,) * layers,
        num_sinks=num_sinks,
        window=window,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **{"max_length": 8192, "max_running": 4096, "max_step_tokens": 4096, **more},
    )


@pytest.mark.parametrize("shape", BYTES_PER_TOKEN)
def test_tokens_of_large_models_take_the_bytes_that_were_counted_by_hand(spec, shape: tuple[int, int, int]) -> None:
    for bits, expected in zip((16, 8, 4, 3, 2), BYTES_PER_TOKEN[shape], strict=True):
        (group,) = large(shape, bits).plan(spec, 100 << 30).groups
        assert group.page_bytes == expected * PAGE
    assert (
        plain_page_bytes(large(shape, 16).model(spec), page_size=PAGE, number_bytes=2)
        == (BYTES_PER_TOKEN[shape][0] * PAGE // shape[0],) * shape[0]
    )


@pytest.mark.parametrize("gib", [4, 16, 60])
@pytest.mark.parametrize(
    ("bits", "num_sinks", "times"), [(8, 0, 1.93), (4, 0, 3.75), (4, 4, 3.5), (3, 4, 4.6), (2, 0, 7.0), (2, 64, 6.0)]
)
def test_the_same_memory_holds_so_many_times_the_tokens(
    spec, gib: int, bits: int, num_sinks: int, times: float
) -> None:
    shape = (32, 8, 128)
    plain, plan = (large(shape, each, num_sinks=num_sinks).plan(spec, gib << 30) for each in (16, bits))
    assert plan.num_tokens >= times * plain.num_tokens
    assert plan.num_bytes <= gib << 30


@pytest.mark.parametrize(
    ("bits", "length", "times"), [(4, 4096, 3.5), (4, 16_384, 3.5), (2, 8192, 6.0), (2, 16_384, 6.0)]
)
@pytest.mark.parametrize("step_tokens", [48, 2048])
def test_what_the_usual_exact_tokens_leave(spec, bits: int, length: int, times: float, step_tokens: int) -> None:
    shape = (32, 8, 128)
    past = PastRule(sink_tokens=USUAL_SINK_TOKENS[bits], recent_tokens=USUAL_RECENT_TOKENS[bits])
    limits = {"max_length": length, "max_step_tokens": step_tokens, "forgets": past.depends_on_steps}
    plain = large(shape, 16, **limits).plan(spec, 4 << 30)
    plan = large(shape, bits, num_sinks=past.sink_tokens, window=past.kept_window, **limits).plan(spec, 4 << 30)
    assert plan.num_tokens >= times * plain.num_tokens
    assert plan.num_bytes <= 4 << 30
    # Not only the codes: texts that use their exact pages too.
    assert plan.longest_texts >= int(times * plain.num_tokens / length)


def test_short_texts_find_exact_pages_too(spec) -> None:
    """Texts of 8192 tokens would need one page each, 14 of them here; a twentieth of the memory holds 102."""
    case = large((32, 8, 128), 4, num_sinks=4)
    plan = case.plan(spec, 4 << 30)
    assert plan.groups[-1].page_bytes == 2 << 20
    assert (plan.longest_texts, plan.num_pages[-1]) == (14, 103)
    few = replace(case, max_running=20).plan(spec, 4 << 30)
    assert few.num_pages[-1] == 21


def test_pages_of_a_window_are_those_of_its_tokens_and_once_those_of_a_step(spec) -> None:
    """Twenty tokens touch three pages at most, seventeen sinks two; a step of 32 tokens takes two."""
    case = Case(windows=(None, 7), bits=(4, 2), num_sinks=17, window=20)
    group = case.plan(spec, 10**9).groups[-1]
    assert (group.pages_per_text, group.step_pages, group.layers, group.window) == (5, 2, (0, 1), 20)
    assert case.plan(spec, 10**9).num_pages[-1] == 1 + 2 + 4 * 5
    forgetting = replace(case, forgets=True).plan(spec, 10**9)
    assert (forgetting.groups[-1].pages_per_text, forgetting.groups[-1].step_pages) == (5, 0)
    assert forgetting.num_pages[-1] == 1 + 4 * 5
    none = replace(case, window=0).plan(spec, 10**9).groups[-1]
    assert (none.pages_per_text, none.step_pages) == (2, 0)
    short = replace(case, max_length=40).plan(spec, 10**9).groups[-1]
    assert (short.pages_per_text, short.step_pages) == (3, 0)


def test_the_log_tells_what_exact_pages_take(spec) -> None:
    case = Case(windows=(None,), bits=(4,), num_sinks=4, window=20, max_length=112)
    plan = case.plan(spec, 10**9)
    assert plan.sentence().endswith(
        "448 tokens in pages of 16; 4 texts of 112 tokens at once; 0.0 MiB of it for the first 4 and the last 20 "
        "tokens of a text in full precision, enough for 4 texts"
    )
    assert "the first 4 tokens of a text" in replace(case, window=0).plan(spec, 10**9).sentence()
    assert "the last 20 tokens of a text" in replace(case, num_sinks=0).plan(spec, 10**9).sentence()


def test_what_one_text_needs_is_named(spec) -> None:
    case = Case(windows=(None,), bits=(4,), num_sinks=4, window=20)
    group = case.plan(spec, 10**9).groups
    least = 8 * group[0].page_bytes + (1 + 2 + 4) * group[1].page_bytes
    assert case.plan(spec, least).longest_texts == 1
    with pytest.raises(CapacityError) as caught:
        case.plan(spec, least - 1)
    assert caught.value.expected == f"{least:,} bytes for one text of 100 tokens"
