"""How fast an engine is on a machine: correctness first, then reading, writing one text, and serving many."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from optgptq.errors import UsageError
from optgptq.evaluation.bench_report import (
    WARM_UP_TOKENS,
    BenchReport,
    BenchSettings,
    CacheFigures,
    PageFigures,
    Speeds,
    Spread,
)
from optgptq.evaluation.decode_floor import Bandwidth, decode_bytes, measure_bandwidth
from optgptq.evaluation.engine_check import EngineCheck, check_engine
from optgptq.evaluation.throughput import Served, draw_prompts, percentile, serve
from optgptq.memory import peak_memory_bytes
from optgptq.runtime.engine import Engine
from optgptq.scheduling.usage import Usage

# Enough to see a wrong page or position; each token costs a full forward.
_CHECK_PROMPTS, _CHECK_TOKENS, _CHECK_SIZES = 3, 8, (5, 40)

Progress = Callable[[int, int], None]


def run_bench(engine: Engine, settings: BenchSettings, *, progress: Progress | None = None) -> BenchReport:
    """Measure an engine that has nothing else to do; see `run_benches`."""
    return run_benches([engine], settings, progress=progress)[0]


def run_benches(
    engines: Sequence[Engine], settings: BenchSettings, *, progress: Progress | None = None
) -> list[BenchReport]:
    """Measure engines of one model that have nothing else to do, in turns and with the same prompts.

    Args:
        engines: their settings decide how requests share the model.
        settings: what to measure.
        progress: called with rounds done and rounds in all.

    Raises:
        UsageError: prompt and new tokens together are more than a text may have.
        GateError: an engine does not write what the model says.
        CapacityError: no room for the requests.
    """
    arms = [_Arm(engine=engine, generator=random.Random(settings.seed)) for engine in engines]
    for arm in arms:
        _require_room(arm.engine, settings)
    for arm in arms:
        arm.check = _check(arm.engine, settings, arm.generator) if settings.check else None
        _together(arm.engine, settings, arm.generator, num_new_tokens=WARM_UP_TOKENS)
    for number in range(settings.rounds):
        for place, arm in enumerate(arms, start=1):
            arm.rounds.append(_round(arm.engine, settings, arm.generator))
            if progress is not None:
                progress(number * len(arms) + place, settings.rounds * len(arms))
    device = engines[0].decoder.device
    peaks = peak_memory_bytes(), torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    # After the peaks: it takes a large buffer.
    bandwidth = measure_bandwidth(device)
    return [_report(arm, settings, peaks, bandwidth) for arm in arms]


@dataclass(slots=True, kw_only=True)
class _Arm:
    """An engine, its own copy of the prompts' random numbers, and what was found so far."""

    engine: Engine
    generator: random.Random
    check: EngineCheck | None = None
    rounds: list[_Round] = field(default_factory=list)


def _report(arm: _Arm, settings: BenchSettings, peaks: tuple[int, int | None], bandwidth: Bandwidth) -> BenchReport:
    engine, speeds = arm.engine, _speeds(arm.rounds)
    context = settings.usual_size + settings.num_new_tokens // 2
    needed = decode_bytes(engine.decoder, engine.cache, context=context)
    return BenchReport(
        cache=_cache_figures(engine),
        check=arm.check,
        speeds=speeds,
        bytes_per_token=needed,
        bandwidth=bandwidth,
        floor_share=needed.total / bandwidth.bytes_per_second / speeds.token_p50.median,
        pages=_page_figures(engine, arm.rounds),
        peak_memory_bytes=peaks[0],
        peak_device_bytes=peaks[1],
    )


def _require_room(engine: Engine, settings: BenchSettings) -> None:
    if settings.longest <= engine.max_length:
        return
    fitting = settings.cut(engine.max_length)
    sizes = "{}:{}".format(*fitting.prompt_sizes)
    raise UsageError(
        "--prompt-tokens and --new-tokens",
        expected=f"at most {engine.max_length} tokens together, which is all that a text may have here",
        found=str(settings.longest),
        action="Use a model or a max_length with room for 8 tokens."
        if fitting.longest > engine.max_length
        else f"Write --prompt-tokens {sizes} --new-tokens {fitting.num_new_tokens} for example.",
    )


def _check(engine: Engine, settings: BenchSettings, generator: random.Random) -> EngineCheck:
    spec = engine.decoder.spec
    # Beyond what the model promises its rotary frequencies may change with the length, for keys in pages from then on.
    longest = min(engine.max_length, spec.max_position or engine.max_length)
    largest = max(min(_CHECK_SIZES[1], longest - _CHECK_TOKENS), 1)
    prompts = draw_prompts(
        generator,
        count=_CHECK_PROMPTS,
        sizes=(min(_CHECK_SIZES[0], largest), largest),
        vocab_size=spec.vocab_size,
    )
    return check_engine(engine, prompts, num_new_tokens=_CHECK_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """One round: a prompt that is read, a text that is written alone, many texts, and the pages around those."""

    reading: Served
    writing: Served
    together: Served
    before: Usage
    after: Usage


def _round(engine: Engine, settings: BenchSettings, generator: random.Random) -> _Round:
    vocab_size = engine.decoder.spec.vocab_size

    def alone(size: int, num_new_tokens: int) -> Served:
        prompts = draw_prompts(generator, count=1, sizes=(size, size), vocab_size=vocab_size)
        return serve(engine, prompts, num_new_tokens=num_new_tokens)

    reading = alone(settings.prompt_sizes[1], 1)
    writing = alone(settings.usual_size, settings.num_new_tokens)
    before = engine.usage()
    together = _together(engine, settings, generator, num_new_tokens=settings.num_new_tokens)
    return _Round(reading=reading, writing=writing, together=together, before=before, after=engine.usage())


def _together(engine: Engine, settings: BenchSettings, generator: random.Random, *, num_new_tokens: int) -> Served:
    prompts = draw_prompts(
        generator,
        count=settings.num_requests,
        sizes=settings.prompt_sizes,
        vocab_size=engine.decoder.spec.vocab_size,
        num_shared=settings.num_shared,
    )
    return serve(engine, prompts, num_new_tokens=num_new_tokens)


def _speeds(rounds: Sequence[_Round]) -> Speeds:
    def spread(figure: Callable[[_Round], float]) -> Spread:
        return Spread.of(map(figure, rounds))

    return Speeds(
        prefill=spread(lambda each: each.reading.num_prompt_tokens / each.reading.first_tokens[0]),
        token_p50=spread(lambda each: percentile(each.writing.gaps, 50)),
        token_p99=spread(lambda each: percentile(each.writing.gaps, 99)),
        new_tokens=spread(lambda each: each.together.num_new_tokens / each.together.seconds),
        all_tokens=spread(lambda each: each.together.num_tokens / each.together.seconds),
        first_token_p50=spread(lambda each: percentile(each.together.first_tokens, 50)),
        first_token_p99=spread(lambda each: percentile(each.together.first_tokens, 99)),
        gap_p50=spread(lambda each: percentile(each.together.gaps, 50)),
        gap_p99=spread(lambda each: percentile(each.together.gaps, 99)),
    )


def _page_figures(engine: Engine, rounds: Sequence[_Round]) -> PageFigures:
    def gained(figure: Callable[[Usage], int]) -> int:
        return sum(figure(each.after) - figure(each.before) for each in rounds)

    plan = engine.runner.attend.pool.plan
    pairs = list(zip(plan.groups, engine.usage().groups, strict=True))
    allocated = gained(lambda usage: sum(group.allocated_slot_steps for group in usage.groups))
    filled = gained(lambda usage: sum(group.filled_slot_steps for group in usage.groups))
    return PageFigures(
        total_bytes=sum(group.page_bytes * usage.total_slots // plan.page_size for group, usage in pairs),
        peak_bytes=sum(group.page_bytes * usage.peak_allocated_slots // plan.page_size for group, usage in pairs),
        waste_ratio=1 - filled / allocated,
        num_preemptions=gained(lambda usage: usage.num_preemptions),
        prefix_hit_tokens=gained(lambda usage: usage.prefix_hit_tokens),
        prompt_tokens=gained(lambda usage: usage.prompt_tokens),
    )


def _cache_figures(engine: Engine) -> CacheFigures:
    cache, pool = engine.cache, engine.runner.attend.pool
    plain_bits = 8.0 * engine.decoder.dtype.itemsize
    exact = pool.exact_group
    code_groups = [group for group in pool.plan.groups if not group.is_exact]
    return CacheFigures(
        choice=engine.settings.kv_cache,
        past_only=None if cache is None else cache.past.name,
        key_bits=plain_bits if cache is None else cache.key_bits,
        value_bits=plain_bits if cache is None else cache.value_bits,
        bytes_per_token=sum(group.page_bytes for group in code_groups) / pool.plan.page_size,
        num_tokens=pool.plan.num_tokens,
        exact_bytes=0 if exact is None else pool.plan.groups[exact].page_bytes * (pool.plan.num_pages[exact] - 1),
    )
