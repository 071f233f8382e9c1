"""Requests as coroutines: what they get, what ends them, and that none of them waits for another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.engines import byte_engine, nothing_is_held, run_out, saying, write_byte_model

from optgptq import AsyncEngine, EngineSettings, SamplingParams
from optgptq.errors import CapacityError, UsageError
from optgptq.runtime.engine import Engine
from optgptq.runtime.results import Piece

PROMPTS = [list(range(5, 17)), list(range(40, 63)), [9, 8, 7]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(folder: Path) -> Engine:
    return byte_engine(folder)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    engine = byte_engine(folder)
    names = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
    results, _ = run_out(engine)
    return [results[name].token_ids for name in names]


@asynccontextmanager
async def opened(engine: Engine) -> AsyncIterator[AsyncEngine]:
    """Yield an asynchronous engine, closed at the end, with nothing left in it."""
    async with AsyncEngine(engine) as running:
        yield running
    assert nothing_is_held(engine)
    assert not any(thread.name == "optgptq-engine" for thread in threading.enumerate())


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), timeout=60))


def slow(seconds: float) -> SamplingParams:
    """Return parameters of a long text whose tokens take time."""

    def waiting(prompt_ids, output_ids, logits_V):
        time.sleep(seconds)
        return logits_V

    return SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True, logits_processors=[waiting])


def test_requests_at_the_same_time_get_what_each_gets_alone(engine: Engine, expected: list[list[int]]) -> None:
    async def scene() -> None:
        async with opened(engine) as running:
            results = await asyncio.gather(*(running.generate(prompt, GREEDY) for prompt in PROMPTS * 3))
            assert [result.token_ids for result in results] == expected * 3
            again = await running.generate(PROMPTS[0], GREEDY)  # after a time without work
            assert again.token_ids == expected[0]

    run(scene)


def test_pieces_are_the_text(engine: Engine) -> None:
    async def scene() -> None:
        async with opened(engine) as running:
            params = saying(engine, "naïve #EN text #END", stop="#END", n=2)
            pieces = [piece async for piece in running.stream("hello", params, request_id="it")]
            whole = await running.generate("hello", params)
            for index, text in enumerate(whole.outputs):
                own = [piece for piece in pieces if piece.index == index]
                assert "".join(piece.text for piece in own) == text.text == "naïve #EN text "
                assert [token for piece in own for token in piece.token_ids] == text.token_ids
                assert own[-1].finish_reason == "stop"
            assert {piece.request_id for piece in pieces} == {"it"}

    run(scene)


def test_a_stream_that_is_left_early_is_cancelled(engine: Engine, expected: list[list[int]]) -> None:
    async def scene() -> None:
        async with opened(engine) as running:
            stream = running.stream(PROMPTS[0], slow(0.01), request_id="left")
            other = asyncio.create_task(running.generate(PROMPTS[1], GREEDY))
            async for piece in stream:
                if piece.token_ids:
                    break
            await stream.aclose()
            # The name is free again as soon as the thread has heard of it: orders are obeyed in turn.
            assert (await running.generate(PROMPTS[0], GREEDY, request_id="left")).token_ids == expected[0]
            assert (await other).token_ids == expected[1]

    run(scene)


def test_a_coroutine_that_is_cancelled_cancels_its_request(engine: Engine) -> None:
    async def scene() -> None:
        async with opened(engine) as running:
            task = asyncio.create_task(running.generate(PROMPTS[0], slow(0.01), request_id="it"))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            result = await running.generate(PROMPTS[0], GREEDY, request_id="it")
            assert len(result.token_ids) == 12

    run(scene)


def test_cancel_by_name_gives_what_there_is(engine: Engine) -> None:
    async def scene() -> None:
        async with opened(engine) as running:
            task = asyncio.create_task(running.generate(PROMPTS[0], slow(0.01), request_id="it"))
            pieces = []
            async for piece in running.stream(PROMPTS[1], slow(0.01), request_id="other"):
                pieces.append(piece)
                if len(pieces) == 3:
                    running.cancel("it")
                    running.cancel("other")
                    running.cancel("never there")
            assert pieces[-1].finish_reason == "cancelled"
            result = await task
            assert result.finish_reason == "cancelled"
            assert 0 < len(result.token_ids) < 50

    run(scene)


def test_refusals_are_for_who_asked(folder: Path, expected: list[list[int]]) -> None:
    engine = byte_engine(folder, max_running=1, max_waiting=1)

    async def scene() -> None:
        async with opened(engine) as running:
            first = running.stream(PROMPTS[0], slow(0.01), request_id="first")
            await anext(first)  # it runs, and the queue is empty
            second = asyncio.create_task(running.generate(PROMPTS[1], GREEDY))
            await asyncio.sleep(0)
            with pytest.raises(CapacityError, match="max_waiting = 1"):
                await running.generate(PROMPTS[2], GREEDY)
            with pytest.raises(UsageError, match="expected a new id, found one in use"):
                await anext(running.stream(PROMPTS[2], GREEDY, request_id="first"))
            with pytest.raises(UsageError, match="found an empty prompt"):
                await running.generate([], GREEDY)
            with pytest.raises(UsageError, match="expected a salt of bytes, found str 'text'"):
                await running.generate([5], GREEDY, salt="text")
            with pytest.raises(UsageError, match="expected SamplingParams, found str 'greedy'"):
                await running.generate([5], "greedy")
            await first.aclose()
            assert (await second).token_ids == expected[1]

    run(scene)


class Unreadable(list):
    """A prompt whose own code goes wrong."""

    def __iter__(self):
        raise RuntimeError("cannot be read")


def test_whatever_a_submission_raises_is_heard_by_who_asked(engine: Engine, expected: list[list[int]]) -> None:
    async def scene() -> None:
        async with opened(engine) as running:
            good = asyncio.create_task(running.generate(PROMPTS[0], GREEDY))
            with pytest.raises(RuntimeError, match="cannot be read"):
                await running.generate(Unreadable([1]), GREEDY)
            with pytest.raises(UsageError, match="a timeout in seconds, found a whole number of 1329 bits"):
                await running.generate(PROMPTS[1], GREEDY, timeout_seconds=10**400)
            with pytest.raises(UsageError, match="a priority that is a finite number, found float nan"):
                await running.generate(PROMPTS[1], GREEDY, priority=float("nan"))
            with pytest.raises(UsageError, match="request: expected a request_id that is text, found list"):
                await running.generate(PROMPTS[1], GREEDY, request_id=[])
            with pytest.raises(UsageError, match="request: expected a request_id that is text, found list"):
                running.cancel([])
            assert (await running.generate(PROMPTS[1], GREEDY)).token_ids == expected[1]
            assert (await good).token_ids == expected[0]

    run(scene)


def test_a_processor_that_ends_the_thread_leaves_nobody_waiting(engine: Engine) -> None:
    def leaving(prompt_ids, output_ids, logits_V):
        raise SystemExit(3)

    async def scene() -> None:
        running = AsyncEngine(engine)
        wanted = [GREEDY, SamplingParams(logits_processors=[leaving]), LONG]
        tasks = [running.generate(prompt, params) for prompt, params in zip(PROMPTS, wanted, strict=True)]
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, UsageError)
            assert "asynchronous engine: expected an open one, found one that SystemExit has ended." in str(error)
            assert isinstance(error.__cause__, SystemExit)
        with pytest.raises(UsageError, match="one that SystemExit has ended"):
            await running.generate(PROMPTS[0], GREEDY)
        await running.close()

    run(scene)
    assert nothing_is_held(engine)


def test_a_request_that_fails_raises_and_others_go_on(engine: Engine, expected: list[list[int]]) -> None:
    def broken(prompt_ids, output_ids, logits_V):
        raise KeyError("no such thing")

    async def scene() -> None:
        async with opened(engine) as running:
            good = asyncio.create_task(running.generate(PROMPTS[0], GREEDY))
            with pytest.raises(UsageError, match="KeyError: 'no such thing'"):
                await running.generate(PROMPTS[1], SamplingParams(logits_processors=[broken]))
            with pytest.raises(UsageError, match="KeyError"):
                [piece async for piece in running.stream(PROMPTS[1], SamplingParams(logits_processors=[broken]))]
            assert (await good).token_ids == expected[0]

    run(scene)


def test_an_error_of_the_model_ends_everything(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    run_step, steps = type(engine.runner).run, []

    def failing(runner, step):
        steps.append(step)
        if len(steps) == 5:
            raise RuntimeError("no memory")
        return run_step(runner, step)

    monkeypatch.setattr(type(engine.runner), "run", failing)

    async def scene() -> None:
        async with AsyncEngine(engine) as running:
            tasks = [asyncio.create_task(running.generate(prompt, LONG)) for prompt in PROMPTS * 3]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [str(result) for result in results] == ["no memory"] * 9
            with pytest.raises(RuntimeError, match="no memory"):
                await running.generate(PROMPTS[0], GREEDY)
            with pytest.raises(RuntimeError, match="no memory"):
                await anext(running.stream(PROMPTS[0], GREEDY))
            running.cancel("anything")

    run(scene)


def test_closing_ends_requests_with_what_they_have(engine: Engine) -> None:
    async def scene() -> None:
        running = AsyncEngine(engine)
        waiting = asyncio.create_task(running.generate(PROMPTS[1], slow(0.01)))
        pieces: list[Piece] = []

        async def read() -> None:
            async for piece in running.stream(PROMPTS[0], slow(0.01)):
                pieces.append(piece)

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        await running.close()
        assert (await waiting).finish_reason == "cancelled"
        await reading
        assert pieces[-1].finish_reason == "cancelled"
        assert nothing_is_held(engine)
        await running.close()  # once more does no harm
        with pytest.raises(UsageError, match="asynchronous engine: expected an open one, found one that was closed"):
            await running.generate(PROMPTS[0], GREEDY)

    run(scene)


def test_the_thread_sleeps_while_there_is_nothing_to_do(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = type(engine).step, []
    monkeypatch.setattr(type(engine), "step", lambda self: (calls.append(1), step(self))[1])

    async def scene() -> None:
        async with opened(engine) as running:
            await running.generate(PROMPTS[0], GREEDY)
            done = len(calls)
            await asyncio.sleep(0.2)
            assert len(calls) == done == 12

    run(scene)


def test_a_slow_reader_holds_nobody_up(engine: Engine, expected: list[list[int]]) -> None:
    async def scene() -> None:
        async with opened(engine) as running:
            stream = running.stream(PROMPTS[0], GREEDY)
            first = await anext(stream)
            assert (await running.generate(PROMPTS[1], GREEDY)).token_ids == expected[1]
            await running.generate(PROMPTS[2], LONG)
            rest = [piece async for piece in stream]  # everything was waiting
            assert [token for piece in (first, *rest) for token in piece.token_ids] == expected[0]

    run(scene)


def test_several_loops_share_an_engine(engine: Engine, expected: list[list[int]]) -> None:
    running = AsyncEngine(engine)
    found: dict[int, list[list[int]]] = {}

    def client(number: int) -> None:
        async def scene() -> None:
            results = await asyncio.gather(*(running.generate(prompt, GREEDY) for prompt in PROMPTS))
            found[number] = [result.token_ids for result in results]

        run(scene)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(running.close())
    assert found == dict.fromkeys(range(3), expected)


def test_a_loop_that_is_gone_leaves_its_requests_to_end(engine: Engine) -> None:
    """Nobody hears of them, but they must not stop the thread."""
    running = AsyncEngine(engine)
    loop = asyncio.new_event_loop()
    stream = running.stream(PROMPTS[0], slow(0.01))
    loop.run_until_complete(anext(stream))
    loop.close()
    result = asyncio.run(running.generate(PROMPTS[1], GREEDY))
    assert len(result.token_ids) == 12
    asyncio.run(running.close())
    assert nothing_is_held(engine)
    del stream


def test_a_folder_can_be_loaded_at_once(folder: Path, expected: list[list[int]]) -> None:
    async def scene() -> None:
        settings = EngineSettings(page_size=8, max_running=4, max_length=64)
        async with AsyncEngine.load(folder, settings=settings) as running:
            assert (await running.generate(PROMPTS[0], GREEDY)).token_ids == expected[0]
            late = await running.generate(PROMPTS[0], GREEDY, timeout_seconds=0.0)
            assert late.finish_reason == "timeout"
            assert len((await running.generate("hello")).token_ids) <= 16

    run(scene)
