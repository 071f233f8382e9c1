"""The engine beside full forwards: what passes, what is a tie, what fails."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import GateError, UsageError
from optgptq.evaluation import engine_check
from optgptq.evaluation.engine_check import check_engine
from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
from optgptq.models.decoder import load_decoder
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings

PROMPTS = [[0, 40, 41, 42, 43], [0, 99], list(range(100, 123))]


def new_engine(**changes: torch.Tensor) -> Engine:
    decoder = load_decoder(CheckpointFolder.open(bundled_path("story-llama")))
    for name, value in changes.items():
        setattr(decoder.embedding, name, value)
    return Engine(decoder, None, EngineSettings(max_length=64, max_running=4))


def test_an_engine_that_is_right() -> None:
    check = check_engine(new_engine(), PROMPTS, num_new_tokens=7)
    assert (check.num_prompts, check.num_tokens, check.num_ties) == (3, 21, 0)


def swap(monkeypatch: pytest.MonkeyPatch, place: int, token: int | None) -> list[int]:
    """Let the engine write another token at a place of the second text; return what that one was."""
    right: list[int] = []
    real = engine_check.generate

    def wrong(*arguments):
        results = real(*arguments)
        (completion,) = results[1].outputs
        right.append(completion.token_ids[place])
        changed = list(completion.token_ids)
        changed[place] = changed[place] + 1 if token is None else token
        results[1] = dataclasses.replace(results[1], outputs=(dataclasses.replace(completion, token_ids=changed),))
        return results

    monkeypatch.setattr(engine_check, "generate", wrong)
    return right


def test_a_wrong_token_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = swap(monkeypatch, 3, None)
    with pytest.raises(GateError) as caught:
        check_engine(new_engine(), PROMPTS, num_new_tokens=7)
    assert caught.value.where == "engine, token 4 of prompt 2"
    assert caught.value.expected == f"token {right[0]}, the likeliest by a full forward"
    assert caught.value.found.startswith(f"token {right[0] + 1}, whose logit is ")


def test_a_token_as_likely_as_the_likeliest_is_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()
    project = engine.decoder.head.project

    def doubled(hidden: torch.Tensor) -> torch.Tensor:
        # Every token has a twin: an odd one the even one below it, by a little less than rounding.
        logits = project(hidden).clone()
        logits[..., 1::2] = logits[..., 0::2] - 1e-5
        return logits

    engine.decoder.head.project = doubled
    swap(monkeypatch, 6, None)
    assert check_engine(engine, PROMPTS, num_new_tokens=7).num_ties == 1


def test_logits_that_are_no_numbers_do_not_pass() -> None:
    with pytest.raises(GateError, match="lower"):
        engine_check._is_tie(torch.full((9,), torch.nan), 5, 1e-2, where="token 1 of prompt 1")


@pytest.mark.parametrize("past_only", ["off", "token", "window:12", "chunk"])
@pytest.mark.parametrize("kv_cache", ["8", "4", "3", "2"])
def test_quantized_caches_that_are_right(kv_cache, past_only) -> None:
    """Prompts of up to 60 tokens, in steps of 17."""
    engine = cached(kv_cache=kv_cache, past_only=past_only, max_step_tokens=17)
    check = check_engine(engine, [*PROMPTS, list(range(60, 120))], num_new_tokens=5)
    assert (check.num_prompts, check.num_tokens) == (4, 20)


@pytest.mark.parametrize("past_only", ["token", "chunk"])
def test_codes_that_are_read_wrongly_are_found(past_only) -> None:
    engine = cached(kv_cache="4", past_only=past_only)
    attend = engine.runner.attend.cache
    store = attend.choice.store

    def halved(key_TKD: torch.Tensor, value_TKD: torch.Tensor, storage: CacheStorage, batch: CacheBatch) -> None:
        store(key_TKD, value_TKD / 2, storage, batch)

    attend.choice = dataclasses.replace(attend.choice, store=halved)
    with pytest.raises(GateError, match="the likeliest by a full forward"):
        check_engine(engine, [list(range(60, 120)), list(range(20, 70))], num_new_tokens=12)


def cached(**settings: str | int) -> Engine:
    decoder = load_decoder(CheckpointFolder.open(bundled_path("story-llama")))
    return Engine(decoder, None, EngineSettings(max_length=96, max_running=4, **settings))


def test_a_prompt_that_is_refused() -> None:
    with pytest.raises(UsageError, match="a prompt of at most"):
        check_engine(new_engine(), [[1] * 64], num_new_tokens=2)
