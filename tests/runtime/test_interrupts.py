"""Ctrl-C at any line of the engine: the next call finds an engine that works, with nothing left in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from support.engines import byte_engine, nothing_is_held, run_out, write_byte_model

from optgptq.runtime import engine as engine_file
from optgptq.runtime.engine import Engine
from optgptq.runtime.llm import generate
from optgptq.runtime.runner import Runner
from optgptq.scheduling import scheduler as scheduler_file
from optgptq.scheduling.sampling_params import SamplingParams
from optgptq.scheduling.step import Step

# Four texts that do not fit together, so that pages are shared, copied, taken away and given back.
PROMPTS = [list(range(5, 19)), "hello", list(range(5, 20))]
PARAMS = [
    SamplingParams(n=2, seed=1, max_tokens=5, ignore_eos=True, stop=["never"]),
    SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True),
    SamplingParams(seed=2, max_tokens=5, ignore_eos=True),
]
TIGHT = {"max_length": 40, "max_step_tokens": 20, "watermark_ratio": 0.0, "max_waiting": 2}
GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
Place = tuple[CodeType, int]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = write_byte_model(tmp_path_factory.mktemp("model"))
    room = byte_engine(folder, **{**TIGHT, "max_running": 1}).runner.attend.pool.plan.num_bytes
    return byte_engine(folder, kv_cache_bytes=room, **TIGHT)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[int]:
    return generate(engine, [PROMPTS[0]], GREEDY)[0].token_ids


@contextmanager
def watched(on_line: Callable[[Place], None]) -> Iterator[None]:
    """Call a function before each line of the engine and of what decides for it; what it raises is raised there."""
    folders = (str(Path(scheduler_file.__file__).parent), engine_file.__file__)
    also = tuple(str(Path(engine_file.__file__).with_name(f"{name}.py")) for name in ("llm", "writing"))

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(folders + also):
            return None
        if event == "line":
            on_line((frame.f_code, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupt_at(number: int, *, again_after: int | None = None) -> Callable[[Place], None]:
    """Return what raises KeyboardInterrupt at one line, counted from 0, and perhaps once more some lines later."""
    numbers = [number] if again_after is None else [number, number + 1 + again_after]
    seen = iter(range(sys.maxsize))

    def on_line(place: Place) -> None:
        if next(seen) in numbers:
            raise KeyboardInterrupt

    return on_line


def likely_anything(runner: Runner, step: Step) -> torch.Tensor:
    """Stand in for the model, which takes most of the time and keeps nothing of a step."""
    return torch.zeros(sum(bool(part.samples) for part in step.parts), runner.decoder.spec.vocab_size)


def run(engine: Engine) -> None:
    generate(engine, PROMPTS, PARAMS, on_piece=lambda number, piece: None)


def places_of(engine: Engine) -> list[Place]:
    """Return all lines in the order in which they are run."""
    places: list[Place] = []
    engine.reset()
    with pytest.MonkeyPatch.context() as patch, watched(places.append):
        patch.setattr(Runner, "run", likely_anything)
        run(engine)
    assert engine.usage().num_preemptions > 0
    return places


def test_at_every_line(engine: Engine, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last time that each line is run."""
    places = places_of(engine)
    first = {place: number for number, place in reversed(list(enumerate(places)))}
    last = {place: number for number, place in enumerate(places)}
    assert len(first) > 250
    for number in sorted({*first.values(), *last.values()}):
        engine.reset()
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "run", likely_anything)
            with pytest.raises(KeyboardInterrupt), watched(interrupt_at(number)):
                run(engine)
        assert nothing_is_held(engine), places[number]
        assert engine.take_results() == []
        if number % 8 == 0:
            assert generate(engine, [PROMPTS[0]], GREEDY)[0].token_ids == expected, places[number]


@pytest.mark.parametrize("again_after", range(1, 24))
def test_twice(engine: Engine, expected: list[int], again_after: int) -> None:
    """The second one comes while everything is thrown away: the next call does that then."""
    num_lines = len(places_of(engine))
    for number in range(29 * again_after, num_lines, num_lines // 5):
        engine.reset()
        with pytest.raises(KeyboardInterrupt), watched(interrupt_at(number, again_after=again_after)):
            run(engine)
        assert generate(engine, [PROMPTS[0]], GREEDY)[0].token_ids == expected


def test_without_generate(engine: Engine, expected: list[int]) -> None:
    """`submit`, `step` and `cancel` themselves leave nothing half-way; what the interrupt came after stays."""

    def scene() -> None:
        names = [engine.submit(prompt, one, stream=True) for prompt, one in zip(PROMPTS[:2], PARAMS[:2], strict=True)]
        engine.step()
        engine.step()
        engine.cancel(names[0])
        run_out(engine)

    places: list[Place] = []
    engine.reset()
    with watched(places.append):
        scene()
    for number in range(0, len(places), 13):
        engine.reset()
        with pytest.raises(KeyboardInterrupt), watched(interrupt_at(number)):
            scene()
        run_out(engine)
        assert nothing_is_held(engine), places[number]
        engine.submit(PROMPTS[0], GREEDY, request_id="again")
        assert run_out(engine)[0]["again"].token_ids == expected


def test_before_and_after_each_call(engine: Engine, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the model and the sampler, which are not watched line by line."""
    for owner, name in ((Runner, "run"), (engine_file, "sample")):
        original = getattr(owner, name)
        for when in ("before", "after"):

            def interrupted(*what: Any, call: Any = original, when: str = when) -> Any:
                if when == "after":
                    call(*what)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    run(engine)
            assert nothing_is_held(engine)
            assert generate(engine, [PROMPTS[0]], GREEDY)[0].token_ids == expected


def test_a_reset_forgets_everything(engine: Engine, expected: list[int]) -> None:
    generate(engine, [PROMPTS[0]], GREEDY)
    name = engine.submit(PROMPTS[0], GREEDY, request_id="it")
    engine.step()
    engine.reset()
    assert nothing_is_held(engine)
    assert engine.usage().prompt_tokens == 0
    assert engine.submit(PROMPTS[0], GREEDY, request_id=name) == name
    result = run_out(engine)[0][name]
    assert (result.token_ids, result.num_cached_tokens) == (expected, 0)
