"""Generation through the cache against a loop of full forward passes, for every family."""

from __future__ import annotations

import threading

import pytest
import torch
from support.tiny_models import TINY_MODELS, random_tokens, reference_model, save_reference

from optgptq.bundled import bundled_path
from optgptq.errors import UsageError
from optgptq.models.attention import attention_context
from optgptq.models.decoder import Decoder
from optgptq.runtime import generation
from optgptq.runtime.generation import generate
from optgptq.runtime.kv_cache import KeyValueCache
from optgptq.runtime.load import load_model
from optgptq.runtime.sampling import SamplingSettings


@pytest.fixture(scope="module")
def story() -> Decoder:
    return load_model(bundled_path("bundled:story-llama"))


@pytest.fixture(params=TINY_MODELS, ids=lambda tiny: tiny.name)
def decoder(request, tmp_path) -> Decoder:
    return load_model(save_reference(reference_model(request.param), tmp_path))


def slow_greedy(decoder: Decoder, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(decoder.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_cached_attention_equals_the_full_forward(decoder):
    tokens_BS = random_tokens(2, 13)
    full_BSV = decoder.logits(tokens_BS)
    cache = KeyValueCache(decoder.spec.num_layers)
    parts = []
    # One position, several onto an empty cache and onto a full one: all three kinds of step.
    for begin, end in ((0, 6), (6, 7), (7, 11), (11, 12), (12, 13)):
        context = attention_context(decoder.spec, end - begin, start=begin, attend=cache.attend)
        parts.append(decoder.logits(tokens_BS[:, begin:end], context))
        cache.advance(end - begin)
    assert cache.length == 13
    torch.testing.assert_close(torch.cat(parts, dim=1), full_BSV, rtol=1e-4, atol=1e-4)


def test_greedy_text_equals_a_loop_of_full_forwards(decoder):
    # Lengths on both sides of the sliding windows, of `dynamic`'s 16 positions and of longrope's 64.
    prompts = [random_tokens(1, size, seed=size)[0].tolist() for size in (3, 12, 61)]
    found = generate(decoder, prompts, SamplingSettings(max_tokens=7))
    assert found == [slow_greedy(decoder, prompt, 7) for prompt in prompts]


def test_the_cache_grows_past_its_first_block(story):
    prompt = random_tokens(1, 120, vocab_size=1024)[0].tolist()
    assert generate(story, [prompt], SamplingSettings(max_tokens=20))[0] == slow_greedy(story, prompt, 20)


def test_results_keep_the_order_of_the_prompts_whatever_the_batches(story, monkeypatch):
    prompts = [random_tokens(1, 3 + index % 3, vocab_size=1024, seed=index)[0].tolist() for index in range(10)]
    settings = SamplingSettings(max_tokens=12, temperature=1.0, seed=3)
    alone = [
        generate(story, [prompt], SamplingSettings(max_tokens=12, temperature=1.0, seed=3 + index))[0]
        for index, prompt in enumerate(prompts)
    ]
    assert generate(story, prompts, settings, num_threads=1) == alone
    monkeypatch.setattr(generation, "_LARGEST_CPU_BATCH", 1)
    monkeypatch.setattr(generation, "_SMALLEST_CPU_BATCH", 1)
    before = torch.get_num_threads()
    assert generate(story, prompts, settings, num_threads=3) == alone
    assert torch.get_num_threads() == before


def test_sequences_that_ended_leave_the_batch_and_the_others_go_on(story):
    prompts = [[0]] * 24
    sampled = SamplingSettings(max_tokens=60, temperature=1.0, seed=1)
    free = generate(story, prompts, sampled)
    # Not the most frequent token, so that texts end all over the place and some never.
    end = int(torch.bincount(torch.tensor(free).flatten()).topk(20).indices[-1])
    ending = SamplingSettings(max_tokens=60, temperature=1.0, seed=1, eos_token_ids=(end,))
    ended = generate(story, prompts, ending)
    for text, whole in zip(ended, free, strict=True):
        expected = whole[: whole.index(end) + 1] if end in whole else whole
        assert text == expected
    assert len({len(text) for text in ended}) > 5
    assert any(end not in text for text in ended)
    ignoring = SamplingSettings(max_tokens=60, temperature=1.0, seed=1, eos_token_ids=(end,), ignore_eos=True)
    assert generate(story, prompts, ignoring) == free


def test_an_error_in_one_batch_ends_the_others(story, monkeypatch):
    monkeypatch.setattr(generation, "_LARGEST_CPU_BATCH", 1)
    monkeypatch.setattr(generation, "_SMALLEST_CPU_BATCH", 1)
    real = generation.choose_tokens
    failed = threading.Event()

    def fail_once(logits_BV, uniform_B, settings):
        if not failed.is_set():
            failed.set()
            raise UsageError("one batch", expected="success", found="failure", action="Nothing.")
        return real(logits_BV, uniform_B, settings)

    monkeypatch.setattr(generation, "choose_tokens", fail_once)
    with pytest.raises(UsageError, match="one batch"):
        generate(story, [[0]] * 4, SamplingSettings(max_tokens=500), num_threads=2)


def test_no_prompts_give_no_texts(story):
    assert generate(story, [], SamplingSettings()) == []


@pytest.mark.parametrize(("prompt", "found"), [([], "none"), ([5, 1024], "1024"), ([-1, 5], "-1")])
def test_prompts_that_cannot_be_read_are_refused(story, prompt, found):
    with pytest.raises(UsageError) as caught:
        generate(story, [[0], prompt], SamplingSettings())
    assert caught.value.where == "prompt 2"
    assert caught.value.found == found


def test_a_position_table_that_is_too_short_is_said_before_any_work(tmp_path):
    (tiny,) = [tiny for tiny in TINY_MODELS if tiny.name == "gpt2-conv1d"]
    decoder = load_model(save_reference(reference_model(tiny), tmp_path))
    prompt = random_tokens(1, 500)[0].tolist()
    assert len(generate(decoder, [prompt], SamplingSettings(max_tokens=13))[0]) == 13
    with pytest.raises(UsageError) as caught:
        generate(decoder, [prompt], SamplingSettings(max_tokens=14))
    assert caught.value.found == "500 + 14 tokens"
    assert "512 positions" in caught.value.expected


def test_more_positions_than_promised_are_a_warning(tmp_path, caplog):
    (tiny,) = [tiny for tiny in TINY_MODELS if tiny.name == "llama-rope_dynamic"]
    decoder = load_model(save_reference(reference_model(tiny), tmp_path))
    generate(decoder, [[1] * 12], SamplingSettings(max_tokens=5))
    assert not caplog.records
    generate(decoder, [[1] * 12], SamplingSettings(max_tokens=6))
    assert "need 17 positions, the model promises 16" in caplog.text
