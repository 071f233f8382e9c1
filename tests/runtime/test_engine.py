"""The engine's behaviour: how texts end, what is shown while they are written, and that one request spoils no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engines import (
    END_OF_TEXT,
    Clock,
    byte_engine,
    nothing_is_held,
    run_out,
    saying,
    write_byte_model,
)
from support.quantizable import tiny_model, write_model

from optgptq.runtime.engine import Engine
from optgptq.runtime.results import Completion
from optgptq.scheduling.sampling_params import SamplingParams

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


def write(engine: Engine, params: SamplingParams, *, stream: bool = False) -> Completion:
    engine.submit(PROMPT, params, request_id="it", stream=stream)
    result = run_out(engine)[0]["it"]
    assert result.error is None
    return result.outputs[0]


def test_a_request_from_its_submission_to_its_result(folder: Path) -> None:
    clock = Clock()
    engine = byte_engine(folder, clock=clock)
    name = engine.submit("hello", GREEDY)
    assert engine.has_work
    clock.now = 2.0
    assert engine.step() == []
    clock.now = 5.0
    results, pieces = run_out(engine)
    result = results[name]
    assert pieces == []
    assert (result.prompt, result.prompt_token_ids) == ("hello", engine.tokenizer.encode("hello"))
    assert (len(result.token_ids), result.finish_reason, result.error) == (12, "length", None)
    assert result.text == engine.tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert (result.seconds_to_first_token, result.seconds) == (2.0, 5.0)
    assert nothing_is_held(engine)


def test_a_bos_is_put_before_text_where_the_tokenizer_does_so(folder: Path, engine: Engine) -> None:
    engine.tokenizer = replace(engine.tokenizer, adds_bos=True)
    engine.submit("a", GREEDY, request_id="text")
    result = run_out(engine)[0]["text"]
    assert result.prompt_token_ids == [0, *engine.tokenizer.encode("a")]
    assert result.token_ids == alone(folder, result.prompt_token_ids)


def test_a_cancelled_request_keeps_what_it_has_and_others_go_on(folder: Path, engine: Engine) -> None:
    engine.submit(PROMPT, GREEDY, request_id="gone", stream=True)
    engine.submit(OTHER, GREEDY, request_id="stays")
    pieces = [piece for _ in range(4) for piece in engine.step()]
    pieces += engine.cancel("gone")
    results, more = run_out(engine)
    gone = results["gone"]
    assert (gone.finish_reason, gone.error) == ("cancelled", None)
    assert gone.token_ids == alone(folder, PROMPT)[: len(gone.token_ids)]
    assert 1 <= len(gone.token_ids) < 12
    assert more == []
    assert "".join(piece.text for piece in pieces) == gone.text
    assert [piece.finish_reason for piece in pieces] == [None] * len(gone.token_ids) + ["cancelled"]
    assert results["stays"].token_ids == alone(folder, OTHER)
    assert engine.cancel("gone") == engine.cancel("never there") == []
    assert nothing_is_held(engine)


def test_a_request_can_be_cancelled_before_its_first_step(engine: Engine) -> None:
    engine.submit(PROMPT, GREEDY, request_id="it")
    engine.cancel("it")
    (entry,) = engine.take_results()
    assert (entry[0], entry[1].finish_reason, entry[1].token_ids) == ("it", "cancelled", [])
    assert entry[1].seconds_to_first_token is None
    assert nothing_is_held(engine)


def test_a_late_request_ends_with_what_it_has(folder: Path) -> None:
    clock = Clock()
    engine = byte_engine(folder, clock=clock, max_running=1)
    engine.submit(PROMPT, GREEDY, request_id="runs", timeout_seconds=10.0, stream=True)
    engine.submit(OTHER, GREEDY, request_id="waits", timeout_seconds=10.0)
    engine.submit(OTHER, GREEDY, request_id="patient", timeout_seconds=11.0)
    for _ in range(3):
        engine.step()
    clock.now = 10.0
    pieces = engine.step()
    assert [(piece.request_id, piece.finish_reason) for piece in pieces] == [("runs", "timeout")]
    results = dict(engine.take_results())
    assert {name: result.finish_reason for name, result in results.items()} == {"runs": "timeout", "waits": "timeout"}
    assert results["runs"].token_ids == alone(folder, PROMPT)[:3]
    assert results["waits"].token_ids == []
    assert run_out(engine)[0]["patient"].token_ids == alone(folder, OTHER)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_ends_the_text(engine: Engine, include: bool, stream: bool) -> None:
    params = saying(engine, "one #EN two #END three", stop=["#END", "never"], include_stop_str_in_output=include)
    engine.submit(PROMPT, params, request_id="it", stream=stream)
    results, pieces = run_out(engine)
    written = results["it"].outputs[0]
    assert written.text == "one #EN two " + ("#END" if include else "")
    assert (written.finish_reason, written.stop_reason) == ("stop", "#END")
    assert engine.tokenizer.decode(written.token_ids) == "one #EN two #END"
    if stream:
        shown = [piece.text for piece in pieces]
        assert "".join(shown) == written.text
        assert "#" not in shown  # it may still become a stop string
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
        assert [token for piece in pieces for token in piece.token_ids] == written.token_ids
    else:
        assert pieces == []


def test_text_held_back_for_a_stop_string_comes_at_the_end(engine: Engine) -> None:
    engine.submit(PROMPT, saying(engine, "one #EN", stop="#END"), request_id="it", stream=True)
    results, pieces = run_out(engine)
    assert results["it"].text == "one #EN"
    assert (pieces[-1].text, pieces[-1].token_ids, pieces[-1].finish_reason) == ("#EN", [], "stop")


def test_no_character_is_split_between_pieces(engine: Engine) -> None:
    text = "naïve 日本 😀!"
    engine.submit(PROMPT, saying(engine, text), request_id="it", stream=True)
    results, pieces = run_out(engine)
    assert results["it"].text == text
    assert "".join(piece.text for piece in pieces) == text
    assert {character for piece in pieces for character in piece.text} == set(text)
    assert len(pieces) == len(text.encode()) + 2  # each byte, the end token, the end


def test_what_ends_a_text(engine: Engine) -> None:
    end = write(engine, saying(engine, "abc"))
    assert (end.text, end.finish_reason, end.stop_reason, end.token_ids[-1]) == ("abc", "stop", None, END_OF_TEXT)
    on = write(engine, saying(engine, "abc", then=[END_OF_TEXT, 70], ignore_eos=True, max_tokens=6))
    assert (on.finish_reason, on.token_ids[3:]) == ("length", [END_OF_TEXT, 70, 70])
    stopped = write(engine, saying(engine, "abc", then=[70, 71], stop_token_ids=[70]))
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("abc", "stop", 70)
    shown = write(engine, saying(engine, "abc", then=[70], stop_token_ids=[70], include_stop_str_in_output=True))
    assert shown.text == "abc" + engine.tokenizer.decode([70])
    full = write(engine, saying(engine, "abcdef", max_tokens=3))
    assert (full.text, full.finish_reason, full.token_ids) == ("abc", "length", engine.tokenizer.encode("abc"))
    no_text = write(engine, saying(engine, "abc", detokenize=False))
    assert (no_text.text, no_text.finish_reason) == ("", "stop")


def test_min_tokens_hold_back_every_end(engine: Engine) -> None:
    class EndFirst:
        def __call__(self, prompt_ids, output_ids, logits_V):
            logits_V.fill_(0.0)[END_OF_TEXT] = 9.0
            logits_V[70], logits_V[80] = 8.0, 7.0
            return logits_V

    params = {"temperature": 0.0, "logits_processors": [EndFirst()], "min_tokens": 3}
    assert write(engine, SamplingParams(**params)).token_ids == [70, 70, 70, END_OF_TEXT]
    assert write(engine, SamplingParams(**params, stop_token_ids=[70])).token_ids == [80, 80, 80, END_OF_TEXT]
    letter = engine.tokenizer.decode([70])
    stopped = write(engine, SamplingParams(**params, stop=letter * 2))
    assert (stopped.token_ids, stopped.text) == ([70, 70, 70], letter)


def test_a_text_ends_where_the_model_does(engine: Engine) -> None:
    text = write(engine, SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    assert text.finish_reason == "length"
    assert len(PROMPT) + len(text.token_ids) == engine.max_length == 64


def test_the_texts_of_a_request_do_not_depend_on_their_number_or_company(folder: Path, engine: Engine) -> None:
    params = {"seed": 11, "max_tokens": 10, "ignore_eos": True}
    engine.submit(OTHER, GREEDY, request_id="company")
    engine.submit(PROMPT, SamplingParams(n=3, **params), request_id="three")
    engine.submit(PROMPT, SamplingParams(n=1, **params), request_id="one")
    results, _ = run_out(engine)
    three = [text.token_ids for text in results["three"].outputs]
    assert [text.index for text in results["three"].outputs] == [0, 1, 2]
    assert len({tuple(tokens) for tokens in three}) == 3
    assert results["one"].token_ids == three[0] == alone(folder, PROMPT, SamplingParams(**params))
    engine.submit(PROMPT, SamplingParams(n=4, **params), request_id="four")
    assert [text.token_ids for text in run_out(engine)[0]["four"].outputs[:3]] == three
    assert nothing_is_held(engine)


def test_requests_without_a_seed_differ_and_repeat_with_the_engine(folder: Path) -> None:
    def texts(seed: int) -> list[list[int]]:
        engine = byte_engine(folder, seed=seed)
        names = [engine.submit(PROMPT, SamplingParams(max_tokens=10, ignore_eos=True)) for _ in range(3)]
        results, _ = run_out(engine)
        return [results[name].token_ids for name in names]

    first = texts(1)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert texts(1) == first
    assert texts(2) != first


def test_logprobs_are_those_of_the_model(engine: Engine) -> None:
    params = SamplingParams(seed=4, temperature=2.5, max_tokens=6, ignore_eos=True, logprobs=3)
    text = write(engine, params)
    whole = torch.tensor([[*PROMPT, *text.token_ids]])
    expected_SV = torch.log_softmax(engine.decoder.logits(whole)[0].double(), dim=-1)[len(PROMPT) - 1 : -1]
    assert len(text.logprobs) == 6
    for token, found, expected_V in zip(text.token_ids, text.logprobs, expected_SV, strict=True):
        best = expected_V.topk(3).indices.tolist()
        assert list(found) == [*best, *([] if token in best else [token])]
        assert found == pytest.approx({one: float(expected_V[one]) for one in found}, abs=1e-4)
    assert write(engine, GREEDY).logprobs is None


def test_penalties_and_biases_reach_the_sampler(engine: Engine) -> None:
    class Flat:
        def __call__(self, prompt_ids, output_ids, logits_V):
            logits_V.fill_(0.0)[[70, 80, PROMPT[0]]] = torch.tensor([1.0, 0.5, 0.7])
            return logits_V

    def tokens(**params) -> list[int]:
        values = {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True, "logits_processors": [Flat()], **params}
        return write(engine, SamplingParams(**values)).token_ids

    assert tokens() == [70, 70, 70]
    assert tokens(presence_penalty=2.0) == [70, PROMPT[0], 80]
    assert tokens(frequency_penalty=0.4) == [70, PROMPT[0], 70]
    assert tokens(repetition_penalty=4.0) == [70, 80, 70]
    assert tokens(logit_bias={80: 2.0}) == [80, 80, 80]


def test_better_priorities_go_first(folder: Path) -> None:
    engine = byte_engine(folder, max_running=1)
    for name, priority in (("late", 5), ("early", -1), ("middle", 0)):
        engine.submit(OTHER, GREEDY, request_id=name, priority=priority)
    assert list(run_out(engine)[0]) == ["early", "middle", "late"]


def test_pages_are_shared_under_one_salt_only(folder: Path, engine: Engine) -> None:
    def cached(salt: bytes) -> int:
        engine.submit(OTHER, GREEDY, request_id="it", salt=salt)
        result = run_out(engine)[0]["it"]
        assert result.token_ids == alone(folder, OTHER)
        return result.num_cached_tokens

    assert [cached(b""), cached(b""), cached(b"a"), cached(b"a"), cached(b"")] == [0, 16, 0, 16, 16]


def test_no_salt_looks_like_the_length_of_a_prompt(tmp_path: Path) -> None:
    """With `dynamic` frequencies keys of a long prompt depend on its length, which is a part of their pages' names."""
    dynamic = byte_engine(write_model(tiny_model("llama-rope_dynamic"), tmp_path))
    salts = [b"", b"\0" * 8, (30).to_bytes(8, "little")]
    names = {salt + dynamic.runner.prompt_salt(length) for salt in salts for length in (5, 16, 17, 30)}
    assert len(names) == 3 * 3  # lengths up to 16 are alike
