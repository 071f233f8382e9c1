"""How fast an engine is on a machine: correctness first, then reading, writing one text, and serving many."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from optgptq.evaluation.bench_report import BenchReport, BenchSettings, PageFigures, Speeds, Spread, require
from optgptq.evaluation.decode_floor import decode_bytes, measure_bandwidth
from optgptq.evaluation.engine_check import EngineCheck, check_engine
from optgptq.evaluation.throughput import Served, draw_prompts, percentile, serve
from optgptq.memory import peak_memory_bytes
from optgptq.runtime.engine import Engine
from optgptq.runtime.memory_plan import layer_groups
from optgptq.scheduling.usage import Usage

# Enough to see a wrong page or position; each token costs a full forward.
_CHECK_PROMPTS, _CHECK_TOKENS, _CHECK_SIZES = 3, 8, (5, 40)
# Kernels are compiled and steps recorded before anything is measured.
_WARM_UP_TOKENS = 4

Progress = Callable[[int, int], None]


def run_bench(engine: Engine, settings: BenchSettings, *, progress: Progress | None = None) -> BenchReport:
    """Measure an engine that has nothing else to do.

    Args:
        engine: its settings decide how requests share the model.
        settings: what to measure.
        progress: called with rounds done and rounds in all.

    Raises:
        UsageError: prompt and new tokens together are more than a text may have.
        GateError: the engine does not write what the model says.
        CapacityError: no room for the requests.
    """
    _require_room(engine, settings)
    generator = random.Random(settings.seed)
    check = _check(engine, settings, generator) if settings.check else None
    _together(engine, settings, generator, num_new_tokens=_WARM_UP_TOKENS)
    rounds = []
    for number in range(1, settings.rounds + 1):
        rounds.append(_round(engine, settings, generator))
        if progress is not None:
            progress(number, settings.rounds)
    speeds = _speeds(rounds)
    device = engine.decoder.device
    peaks = peak_memory_bytes(), torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    # After the peaks: it takes a large buffer.
    bandwidth = measure_bandwidth(device)
    needed = decode_bytes(engine.decoder, context=settings.usual_size + settings.num_new_tokens // 2)
    return BenchReport(
        check=check,
        speeds=speeds,
        bytes_per_token=needed,
        bandwidth=bandwidth,
        floor_share=needed.total / bandwidth.bytes_per_second / speeds.token_p50.median,
        pages=_page_figures(engine, rounds),
        peak_memory_bytes=peaks[0],
        peak_device_bytes=peaks[1],
    )


def _require_room(engine: Engine, settings: BenchSettings) -> None:
    longest = settings.prompt_sizes[1] + max(settings.num_new_tokens, _WARM_UP_TOKENS)
    require(
        longest <= engine.max_length,
        "--prompt-tokens and --new-tokens",
        f"at most {engine.max_length} tokens together, which is all that a text may have here",
        longest,
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

    groups = layer_groups(
        engine.decoder.spec,
        page_size=1,
        number_bytes=engine.decoder.dtype.itemsize,
        max_length=engine.max_length,
        max_step_tokens=1,
    )
    pairs = list(zip(groups, engine.usage().groups, strict=True))
    allocated = gained(lambda usage: sum(group.allocated_slot_steps for group in usage.groups))
    filled = gained(lambda usage: sum(group.filled_slot_steps for group in usage.groups))
    return PageFigures(
        total_bytes=sum(group.page_bytes * usage.total_slots for group, usage in pairs),
        peak_bytes=sum(group.page_bytes * usage.peak_allocated_slots for group, usage in pairs),
        waste_ratio=1 - filled / allocated,
        num_preemptions=gained(lambda usage: usage.num_preemptions),
        prefix_hit_tokens=gained(lambda usage: usage.prefix_hit_tokens),
        prompt_tokens=gained(lambda usage: usage.prompt_tokens),
    )
