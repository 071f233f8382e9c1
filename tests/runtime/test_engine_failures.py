"""One request that goes wrong, is cancelled in the middle of a step or is refused spoils no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engines import Watching, byte_engine, nothing_is_held, run_out, write_byte_model
from support.quantizable import tiny_model, write_model

from optgptq.errors import CapacityError, NumericalError, UsageError
from optgptq.runtime.engine import Engine
from optgptq.scheduling.sampling_params import SamplingParams
from optgptq.scheduling.scheduler import Scheduler
from optgptq.scheduling.settings import PageGroup

PROMPT, OTHER = list(range(5, 17)), list(range(40, 63))
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(folder: Path) -> Engine:
    return byte_engine(folder)


def alone(folder: Path, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    engine = byte_engine(folder)
    engine.submit(prompt, params, request_id="alone")
    return run_out(engine)[0]["alone"].token_ids


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_cancelled_in_mid_step_gets_nothing_more(folder: Path, engine: Engine, n: int) -> None:
    """Whoever samples may cancel anybody, the request whose token is being chosen included."""
    own = Watching(3, lambda: engine.cancel("own"))
    both = Watching(5, lambda: [engine.cancel("other"), engine.cancel("waits")])
    params = {"max_tokens": 12, "ignore_eos": True, "seed": 3}
    engine.submit(PROMPT, SamplingParams(n=n, logits_processors=[own], **params), request_id="own")
    engine.submit(OTHER, SamplingParams(logits_processors=[both], **params), request_id="stays")
    if n == 1:
        engine.submit(OTHER, GREEDY, request_id="other")
        engine.submit(OTHER[:3], SamplingParams(n=2, **params), request_id="waits")
    results, _ = run_out(engine)
    assert {len(text.token_ids) for text in results["own"].outputs} == {3}
    assert {text.finish_reason for text in results["own"].outputs} == {"cancelled"}
    assert results["stays"].token_ids == alone(folder, OTHER, SamplingParams(**params))
    if n == 1:
        assert results["other"].finish_reason == results["waits"].finish_reason == "cancelled"
        assert 0 < len(results["other"].token_ids) < 12
    assert nothing_is_held(engine)


def test_a_request_that_cancels_itself_and_then_fails_is_cancelled(engine: Engine) -> None:
    def cancel_and_fail() -> None:
        engine.cancel("it")
        raise RuntimeError("too late")

    engine.submit(PROMPT, SamplingParams(logits_processors=[Watching(2, cancel_and_fail)]), request_id="it")
    results, _ = run_out(engine)
    assert (results["it"].finish_reason, results["it"].error, len(results["it"].token_ids)) == ("cancelled", None, 2)
    assert nothing_is_held(engine)


@pytest.mark.parametrize("trouble", ["nan", "raises", "shape"])
def test_a_processor_that_goes_wrong_ends_its_own_request(folder: Path, engine: Engine, trouble: str) -> None:
    def broken(prompt_ids, output_ids, logits_V):
        if len(output_ids) < 3:
            return logits_V
        if trouble == "raises":
            raise KeyError("no such thing")
        return logits_V[:-1] if trouble == "shape" else logits_V * torch.nan

    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logits_processors=[broken])
    engine.submit(PROMPT, params, request_id="bad", stream=True)
    engine.submit(PROMPT, GREEDY, request_id="good")
    results, pieces = run_out(engine)
    bad = results["bad"]
    assert isinstance(bad.error, UsageError)
    expected = {"nan": "no token that can be chosen", "raises": "KeyError: 'no such thing'", "shape": "[257]"}
    assert expected[trouble] in str(bad.error)
    assert bad.finish_reason == pieces[-1].finish_reason == "error"
    assert bad.token_ids == alone(folder, PROMPT)[:3]
    assert "".join(piece.text for piece in pieces) == bad.text
    assert results["good"].token_ids == alone(folder, PROMPT)
    assert nothing_is_held(engine)


def test_logits_that_are_no_numbers_end_their_own_request(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = type(engine.runner).run

    def poisoned(runner, step):
        logits_PV = run(runner, step).clone()
        rows = [part for part in step.parts if part.samples]
        for row, part in enumerate(rows):
            if part.sequence.request.request_id == "bad":
                logits_PV[row, 3] = torch.nan
        return logits_PV

    monkeypatch.setattr(type(engine.runner), "run", poisoned)
    engine.submit(PROMPT, SamplingParams(n=2), request_id="bad")
    engine.submit(PROMPT, GREEDY, request_id="good")
    results, _ = run_out(engine)
    assert isinstance(results["bad"].error, NumericalError)
    assert "logits: expected numbers, the greatest of them finite, found nan." in str(results["bad"].error)
    assert [text.finish_reason for text in results["bad"].outputs] == ["error", "error"]
    assert results["good"].token_ids == alone(folder, PROMPT)


def test_a_step_that_fails_takes_its_own_requests_only(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps = type(engine.runner).run, []

    def failing(runner, step):
        steps.append(step)
        if len(steps) == 3:
            raise RuntimeError("no memory")
        return run(runner, step)

    monkeypatch.setattr(type(engine.runner), "run", failing)
    engine.submit(PROMPT, SamplingParams(n=4), request_id="lost")
    engine.submit(OTHER, GREEDY, request_id="waits")
    with pytest.raises(RuntimeError, match="no memory"):
        run_out(engine)
    results, _ = run_out(engine)
    assert list(results) == ["waits"]
    assert results["waits"].token_ids == alone(folder, OTHER)
    assert nothing_is_held(engine)


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "request it: expected a prompt of 1 token or more, found an empty prompt."),
        ([5, 258], {}, "request it: expected token ids from 0 to 257, found 258."),
        ([5, -1], {}, "request it: expected token ids from 0 to 257, found -1."),
        ([5, 6.0], {}, "'float' object cannot be interpreted as an integer. Give whole numbers, or one text."),
        (None, {}, "expected text or a list of token ids, found an object of type NoneType."),
        (7, {}, "expected text or a list of token ids, found an object of type int."),
        (b"abc", {}, "expected text or a list of token ids, found an object of type bytes."),
        (bytearray(b"abc"), {}, "expected text or a list of token ids, found an object of type bytearray."),
        ({5: 6}, {}, "expected text or a list of token ids, found an object of type dict."),
        ({5, 6}, {}, "expected text or a list of token ids, found an object of type set."),
        ((token for token in (5, 6)), {}, "expected text or a list of token ids, found an object of type generator."),
        ("a\ud800b", {}, "expected text that UTF-8 can hold, found '\\ud800' at character 1"),
        (
            [5] * 64,
            {},
            "expected a prompt of at most 63 tokens, so that one can be added, found 64 tokens.",
        ),
        ([5], {"timeout_seconds": float("nan")}, "request it: expected a timeout in seconds, found float nan."),
        ([5], {"timeout_seconds": 10**5000}, "expected a timeout in seconds, found a whole number of 16610 bits."),
        ([5], {"timeout_seconds": "1"}, "expected a timeout in seconds, found str '1'."),
        ([5], {"priority": float("nan")}, "request it: expected a priority that is a finite number, found float nan."),
        ([5], {"priority": float("inf")}, "expected a priority that is a finite number, found float inf."),
        ([5], {"priority": None}, "expected a priority that is a finite number, found NoneType None."),
        ([5], {"priority": "high"}, "expected a priority that is a finite number, found str 'high'."),
        ([5], {"salt": "text"}, "request it: expected a salt of bytes, found str 'text'."),
        ([5], {"request_id": 7}, "request: expected a request_id that is text, found int 7."),
        ([5], {"params": None}, "request it: expected SamplingParams, found NoneType None."),
        ([5], {"params": SamplingParams(n=5)}, "request it: expected n of at most max_running = 4, found n = 5."),
        ([5], {"params": SamplingParams(stop_token_ids=[258])}, "expected token ids below the vocabulary size 258"),
    ],
)
def test_what_is_refused(engine: Engine, prompt: object, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        engine.submit(prompt, **{"params": GREEDY, "request_id": "it", **changes})
    assert message in str(caught.value)
    assert nothing_is_held(engine)
    engine.submit([5], GREEDY, request_id="it")  # the name is free again


def test_empty_text_needs_a_bos(folder: Path, engine: Engine) -> None:
    engine.submit("", GREEDY, request_id="begins with it")
    assert run_out(engine)[0]["begins with it"].token_ids == alone(folder, [0])
    engine.tokenizer = replace(engine.tokenizer, bos_token_id=None)
    with pytest.raises(UsageError, match="request it: expected a prompt of 1 token or more, found an empty prompt"):
        engine.submit("", GREEDY, request_id="it")
    assert nothing_is_held(engine)


def test_text_needs_a_tokenizer(folder: Path) -> None:
    engine = byte_engine(folder, with_tokenizer=False)
    with pytest.raises(UsageError, match="expected token ids, found text, and no tokenizer"):
        engine.submit("hello", GREEDY)
    engine.submit(torch.tensor(PROMPT), GREEDY, request_id="tensor")
    result = run_out(engine)[0]["tensor"]
    assert (result.token_ids, result.text) == (alone(folder, PROMPT), "")


def test_more_than_the_memory_holds_is_refused(folder: Path) -> None:
    """The memory holds every text of `max_length`, so only fewer pages than planned can be too few."""
    engine = byte_engine(folder)
    few = replace(engine.scheduler.settings, groups=(PageGroup(num_pages=4, window=None),))
    engine.scheduler = Scheduler(few)
    assert engine.max_length == 25
    with pytest.raises(CapacityError, match="expected at most 25 tokens, which is what the pages hold"):
        engine.submit(PROMPT, SamplingParams(max_tokens=20))
    name = engine.submit(PROMPT, SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(run_out(engine)[0][name].token_ids) == 25 - len(PROMPT)


def test_a_full_queue_and_a_name_in_use_are_refused(folder: Path) -> None:
    engine = byte_engine(folder, max_running=1, max_waiting=2)
    engine.submit(PROMPT, GREEDY, request_id="first")
    engine.submit(OTHER, GREEDY, request_id="second")
    with pytest.raises(UsageError, match="request first: expected a new id, found one in use"):
        engine.submit(OTHER, GREEDY, request_id="first")
    with pytest.raises(CapacityError, match="expected fewer than max_waiting = 2 waiting sequences, found 2 of them"):
        engine.submit(OTHER, GREEDY, request_id="third")
    engine.step()  # the first one runs now
    engine.submit(PROMPT, GREEDY, request_id="third")
    results, _ = run_out(engine)
    assert [results[name].token_ids for name in ("first", "second", "third")] == [
        alone(folder, PROMPT),
        alone(folder, OTHER),
        alone(folder, PROMPT),
    ]


def test_a_table_of_positions_cannot_be_outgrown(tmp_path: Path) -> None:
    folder = write_model(tiny_model("gpt2-conv1d", n_positions=32, eos_token_id=1, bos_token_id=0), tmp_path)
    with pytest.raises(UsageError, match="max_length: expected at most 32, the rows of the model's position table"):
        byte_engine(folder, max_length=33)
    engine = byte_engine(folder, max_length=None, deterministic=True)
    name = engine.submit(PROMPT, SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(run_out(engine)[0][name].token_ids) == 32 - len(PROMPT)


def test_a_tokenizer_that_cannot_spell_the_prompt_fails_that_request(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.submit(OTHER, GREEDY, request_id="good")
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.tokenizer), "decode", lambda *what, **how: [][0])
        with pytest.raises(IndexError):
            engine.submit(PROMPT, GREEDY, request_id="bad")
    results, _ = run_out(engine)
    assert list(results) == ["good"]
    assert results["good"].token_ids == alone(folder, OTHER)
    assert nothing_is_held(engine)
