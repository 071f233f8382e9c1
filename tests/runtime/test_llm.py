"""`LLM`: checkpoints of every kind, prompts of every kind."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from support.engines import END_OF_TEXT, nothing_is_held, saying
from support.quantizable import tiny_recipe, wide_llama, write_model
from support.tiny_models import TINY_MODELS, reference_model, save_reference

from optgptq import LLM, EngineSettings, SamplingParams, quantize_model
from optgptq.errors import CapacityError, UsageError
from optgptq.recipe.calibration import CalibrationRecipe
from optgptq.recipe.records import ExportRecipe, Recipe
from optgptq.recipe.weights import BinaryRecipe, WeightRecipe
from optgptq.runtime.fused_linears import FUSED_QKV
from optgptq.runtime.linear import QuantLinear
from optgptq.runtime.load import load_model

SETTINGS = EngineSettings(page_size=8, max_running=4, max_length=64)
PROMPTS = ["hello", [9, 8, 7, 6, 5, 4, 3, 2, 9, 8], "one two three four"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
KINDS = ("dense", "gptq", "compressed-tensors", "binary")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of one model: dense, and quantized by this library."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "bos_token_id": 0, "eos_token_id": END_OF_TEXT}
    dense = write_model(wide_llama(**sizes), root / "dense")
    binary = Recipe(
        weights=WeightRecipe(method="binary", bits=3, group_size=-1),
        binary=BinaryRecipe(refits=1, sweeps=1),
        calibration=CalibrationRecipe(num_windows=4, window_size=16),
        export=ExportRecipe(format="optgptq"),
    )
    recipes = {
        "gptq": tiny_recipe(group_size=32, symmetric=False, export={"format": "gptq"}),
        "compressed-tensors": tiny_recipe(group_size=32, export={"format": "compressed-tensors"}),
        "binary": binary,
    }
    return {"dense": dense, **{kind: quantize_model(dense, one, root / kind).output for kind, one in recipes.items()}}


def reference_tokens(folder: Path, prompt: list[int]) -> list[int]:
    """Return the likeliest tokens, each from a whole forward pass over what is there."""
    decoder, tokens = load_model(folder), list(prompt)
    for _ in range(12):
        tokens.append(int(decoder.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_every_kind_held_dense_and_quantized(folders: dict[str, Path], kind: str) -> None:
    dense = LLM(folders[kind], weights="dense", settings=SETTINGS)
    kept = LLM(folders[kind], weights="exact", settings=SETTINGS)
    results = dense.generate(PROMPTS, GREEDY)
    expected = [reference_tokens(folders[kind], result.prompt_token_ids) for result in results]
    assert [result.token_ids for result in results] == expected
    assert [result.token_ids for result in kept.generate(PROMPTS, GREEDY)] == expected
    assert isinstance(kept.engine.decoder.layers[0].linears[FUSED_QKV], QuantLinear) == (kind != "dense")
    assert not isinstance(dense.engine.decoder.layers[0].linears[FUSED_QKV], QuantLinear)


@pytest.fixture
def llm(folders: dict[str, Path]) -> LLM:
    return LLM(folders["dense"], settings=SETTINGS)


def test_good_and_bad_prompts_together(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    bad = ["a\ud800", [], [400], [5] * 64, None, [1, "a"], 7, {5: 6}, b"abc", iter([5])]
    mixed = [bad[0], PROMPTS[0], *bad[1:4], PROMPTS[1], bad[4], PROMPTS[2], *bad[5:]]
    counts, told = [], []
    with caplog.at_level(logging.WARNING, logger="optgptq"):
        results = llm.generate(
            mixed,
            GREEDY,
            progress=lambda done, wanted: counts.append((done, wanted)),
            on_result=lambda number, result: told.append((number, result)),
        )
    assert [result.error is None for result in results] == [prompt not in bad for prompt in mixed]
    assert [result.token_ids for result in results if result.error is None] == [
        llm.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS
    ]
    for result in results:
        if result.error is not None:
            assert isinstance(result.error, UsageError)
            assert (result.outputs, result.text, result.finish_reason, result.token_ids) == ((), "", "error", [])
    assert results[0].request_id == "prompt 1"
    assert caplog.messages == ["10 of 13 prompts failed; `error` of their results says why"]
    assert counts == [(done, 13) for done in range(1, 14)]
    assert sorted(told, key=lambda entry: entry[0]) == list(enumerate(results))
    assert nothing_is_held(llm.engine)


def test_one_prompt_or_several_of_every_type(llm: LLM) -> None:
    ids = PROMPTS[1]
    expected = llm.generate([ids], GREEDY)[0].token_ids
    for prompts in (ids, tuple(ids), np.array(ids), torch.tensor(ids), [np.array(ids)], torch.tensor([ids])):
        (result,) = llm.generate(prompts, GREEDY)
        assert result.token_ids == expected
        assert result.prompt_token_ids == ids
    assert len(llm.generate([None, *PROMPTS], GREEDY)) == 4
    for no_list in (None, 7, b"abc", {5: 6}, iter([ids])):
        (result,) = llm.generate(no_list, GREEDY)
        assert isinstance(result.error, UsageError)
        assert result.prompt_token_ids == []
    number, text = llm.generate([7, "hello"], GREEDY)
    assert (number.error is None, text.error is None) == (False, True)
    assert llm.generate([], GREEDY) == []
    assert len(llm.generate("hello")[0].token_ids) <= 16  # the default of SamplingParams


def test_parameters_for_all_or_for_each(llm: LLM) -> None:
    each = [SamplingParams(temperature=0.0, max_tokens=size, ignore_eos=True) for size in (1, 2, 3)]
    assert [len(result.token_ids) for result in llm.generate(PROMPTS, each)] == [1, 2, 3]
    with pytest.raises(UsageError, match="sampling_params: expected one, or one for each of 3 prompts, found 2"):
        llm.generate(PROMPTS, each[:2])
    good, bad, late = llm.generate(PROMPTS, [each[0], None, each[2]])
    assert (len(good.token_ids), len(late.token_ids)) == (1, 3)
    assert "expected SamplingParams, found NoneType None." in str(bad.error)


@pytest.mark.parametrize("max_running", [1, 3])
def test_a_short_queue_holds_prompts_back(folders: dict[str, Path], llm: LLM, max_running: int) -> None:
    """The limit is for many callers: whoever gives many prompts at once gets all of them served."""
    settings = EngineSettings(page_size=8, max_running=max_running, max_length=64, max_waiting=1)
    prompts = [*PROMPTS, [], *PROMPTS, *PROMPTS]
    results = LLM(folders["dense"], settings=settings).generate(prompts, GREEDY)
    assert [result.token_ids for result in results] == [result.token_ids for result in llm.generate(prompts, GREEDY)]
    assert [number for number, result in enumerate(results) if result.error is not None] == [3]


def test_pieces_come_as_they_are_written(llm: LLM) -> None:
    shown: dict[int, str] = {}

    def show(number, piece) -> None:
        shown[number] = shown.get(number, "") + piece.text

    results = llm.generate(PROMPTS, saying(llm.engine, "naïve text"), on_piece=show)
    assert (
        shown == {number: result.text for number, result in enumerate(results)} == dict.fromkeys(range(3), "naïve text")
    )


def test_what_is_interrupted_leaves_nothing_behind(llm: LLM) -> None:
    def interrupt(number, result) -> None:
        raise KeyboardInterrupt

    params = [GREEDY, SamplingParams(temperature=0.0, max_tokens=2), GREEDY]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, params, on_result=interrupt)
    assert nothing_is_held(llm.engine)
    assert llm.engine.take_results() == []
    assert [len(result.token_ids) for result in llm.generate(PROMPTS, GREEDY)] == [12] * 3


def test_a_folder_without_a_tokenizer_takes_token_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == "bloom-alibi")
    folder = save_reference(reference_model(tiny), tmp_path)
    llm = LLM(folder, settings=SETTINGS)
    assert caplog.messages[0] == f"{folder} has no tokenizer: prompts must be token ids, and results have no text"
    text, ids = llm.generate(["hello", [5, 6, 7]], GREEDY)
    assert "found text, and no tokenizer" in str(text.error)
    assert (len(ids.token_ids), ids.text) == (12, "")


def test_what_a_model_cannot_be_loaded_with(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="device tpu: expected one of cpu"):
        LLM(folders["dense"], device="tpu")
    with pytest.raises(CapacityError, match=r"memory for keys and values: expected .* for one text of 64 tokens"):
        LLM(folders["dense"], settings=EngineSettings(max_length=64, kv_cache_bytes=1000))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(folders: dict[str, Path], dtype: str) -> None:
    llm = LLM(folders["dense"], dtype=dtype, settings=SETTINGS)
    assert llm.engine.runner.attend.pool.layers[0].keys_ZKDY.dtype == getattr(torch, dtype)
    assert [len(result.token_ids) for result in llm.generate(PROMPTS, GREEDY)] == [12] * 3


def test_a_cache_in_place_of_that_of_the_settings() -> None:
    sizes = EngineSettings(max_running=2, max_length=64, kv_cache="8", past_only="off")
    cache = LLM("bundled:story-llama", settings=sizes, kv_cache="4", past_only="window:32").engine.cache
    assert cache is not None
    assert (cache.past.name, cache.setup.source) == ("window:32", "4 bits without calibration")
    assert LLM("bundled:story-llama", settings=sizes, kv_cache="16").engine.cache is None
    llm = LLM("bundled:story-llama", settings=sizes)
    assert (llm.engine.cache.past.name, llm.engine.cache.key_bits) == ("off", 9)
    plain = LLM("bundled:story-llama", settings=sizes, kv_cache="checkpoint")
    (found, expected) = (one.generate("Once upon a time", GREEDY)[0].text for one in (llm, plain))
    assert found == expected
    with pytest.raises(UsageError, match="one of checkpoint, 16, 8, 4, 3, 2"):
        LLM("bundled:story-llama", kv_cache="5")
