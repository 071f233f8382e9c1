"""Prompts of every kind through an engine: BOS, chat, refusals, and what is told while it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.texts import write_tokenizer

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.tokenizer import Tokenizer, load_tokenizer
from optgptq.errors import TextError, UsageError
from optgptq.models.decoder import load_decoder
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.llm import generate
from optgptq.runtime.prompts import PromptRequest, prompt_ids, require_unicode, run_requests
from optgptq.scheduling.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
CHAT = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def ask(text: str | None = None, **fields: object) -> PromptRequest:
    return PromptRequest(**{"where": "prompt 1", "params": GREEDY, "text": text, **fields})


def tokenizer_of(folder: Path, *, adds_bos: bool = False, template: str | None = None) -> Tokenizer:
    config = {} if template is None else {"chat_template": template}
    return load_tokenizer(write_tokenizer(folder, adds_bos=adds_bos, config=config))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_is_the_tokenizers_habit_unless_it_is_said(tmp_path: Path, adds_bos: bool) -> None:
    tokenizer = tokenizer_of(tmp_path, adds_bos=adds_bos)
    plain = tokenizer.encode("Tom")
    assert prompt_ids(ask("Tom"), tokenizer, bos=None) == ([0, *plain] if adds_bos else plain)
    assert prompt_ids(ask("Tom"), tokenizer, bos=True) == [0, *plain]
    assert prompt_ids(ask("Tom"), tokenizer, bos=False) == plain
    assert prompt_ids(ask(""), tokenizer, bos=None) == [0]
    assert prompt_ids(ask(token_ids=(5,)), tokenizer, bos=True) == [5]
    with pytest.raises(TextError, match="an empty prompt, and no BOS token"):
        prompt_ids(ask(""), tokenizer, bos=False)


def test_a_chat_ends_with_what_the_answer_comes_after(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, adds_bos=True, template=CHAT)
    expected = tokenizer.encode("system: Be brief.\nuser: Hello\nassistant:")
    chat = ask("Hello").as_chat("Be brief.")
    assert prompt_ids(chat, tokenizer, bos=None) == expected
    assert prompt_ids(chat, tokenizer, bos=True) == [0, *expected]
    assert prompt_ids(ask("Hello").as_chat(None), tokenizer, bos=None) == tokenizer.encode("user: Hello\nassistant:")
    # Token ids and messages stay what they are.
    for request in (ask(token_ids=(5,)), ask(messages=[{"role": "user", "content": "x"}])):
        assert request.as_chat("Be brief.") is request


def test_what_the_model_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="token ids: the model has no tokenizer"):
        prompt_ids(ask("Tom"), None, bos=None)
    with pytest.raises(TextError, match="a file chat_template"):
        prompt_ids(ask("Tom").as_chat(None), tokenizer_of(tmp_path), bos=None)
    require_unicode("\ud7ff\ue000 \U0001f600", "prompt 1")
    with pytest.raises(TextError, match="half of a surrogate pair"):
        require_unicode("a\udc80", "prompt 1")


@pytest.fixture(scope="module")
def engine() -> Engine:
    folder = bundled_path("story-llama")
    settings = EngineSettings(max_length=64, max_running=4)
    return Engine(load_decoder(CheckpointFolder.open(folder)), load_tokenizer(folder), settings)


def test_results_are_in_order_and_each_is_told_once(engine: Engine) -> None:
    texts = ["Once upon", "", "Tom had", "x" * 500, "The"]
    requests = [dataclasses.replace(ask(text), where=f"prompt {number}") for number, text in enumerate(texts, start=1)]
    requests.append(ask(token_ids=(3, 99_999), where="prompt 6"))
    requests.append(ask("Hi", where="prompt 7").as_chat(None))
    requests.append(ask("Hi", where="prompt 8", params=SamplingParams(stop_token_ids=[99_999])))
    told: list[int] = []
    pieces: dict[int, str] = {}

    def on_piece(number: int, piece: object) -> None:
        pieces[number] = pieces.get(number, "") + piece.text

    results = run_requests(engine, requests, on_result=lambda number, result: told.append(number), on_piece=on_piece)
    assert sorted(told) == list(range(8))
    assert told[0] == 6, "what has no prompt at all is refused before anything runs"
    errors = {number: result.error for number, result in enumerate(results) if result.error is not None}
    assert {number: (type(error), error.where) for number, error in errors.items()} == {
        3: (UsageError, "prompt 4"),
        5: (UsageError, "prompt 6"),
        6: (TextError, f"prompt 7, chat template of {bundled_path('story-llama')}"),
        7: (UsageError, "prompt 8, stop_token_ids"),
    }
    written = {number: result.text for number, result in enumerate(results) if number not in errors}
    assert pieces == written
    assert all(written.values())
    assert [result.text for result in run_requests(engine, [requests[2]])] == [written[2]]


def test_the_engine_reads_an_empty_prompt_in_the_same_way(engine: Engine) -> None:
    with_bos = generate(engine, [[engine.tokenizer.bos_token_id], "", []], GREEDY)
    asked = run_requests(engine, [ask(""), ask(token_ids=())])
    assert with_bos[0].token_ids == with_bos[1].token_ids == asked[0].token_ids
    refused = with_bos[2].error, asked[1].error
    assert [(type(error), error.found) for error in refused] == [(UsageError, "an empty prompt")] * 2


def test_a_request_to_stop_leaves_the_engine_empty(engine: Engine) -> None:
    def stop(number: int, piece: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_requests(engine, [ask("Once"), ask("Tom")], on_piece=stop)
    assert not engine.has_work
    assert engine.usage().allocated_slots == 0
