"""Quantized caches fitted to engines: what is refused, what is chosen, what names pages."""

from __future__ import annotations

import logging
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from support.cached_engines import cached_engine, outcomes, prompts_of, random_setup, write_cached_model
from support.tiny_models import TINY_MODELS, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import ModelError, OptGPTQError, UsageError
from optgptq.formats.kv_cache_config import write_cache_setup
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme, PastRule, SideScheme
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.cache_plan import CachePlan, layer_page_bytes, plan_cache
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.llm import load_for_engine, with_cache
from optgptq.runtime.page_pool import LayerPages
from optgptq.scheduling.sampling_params import SamplingParams

PAST = PastRule(mode="token", sink_tokens=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return write_cached_model("llama-grouped_query", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def spec(folder) -> DecoderSpec:
    return model_spec(CheckpointFolder.open(folder))


def plan(spec: DecoderSpec, setup=None, **settings) -> CachePlan | None:
    return plan_cache(setup, spec, EngineSettings(**settings), number_bytes=4)


def test_what_the_folder_says_and_what_takes_its_place(spec) -> None:
    setup = random_setup(spec, ["4", "16", "K3V16"], PAST)
    assert plan(spec) is None
    found = plan(spec, setup)
    assert found.setup is setup
    assert (found.past, found.quantized_layers) == (PAST, (0, 2))
    assert [None if layout is None else layout.scheme for layout in found.layouts] == [
        setup.scheme.layers[0],
        None,
        setup.scheme.layers[2],
    ]
    assert plan(spec, setup, kv_cache="16") is None
    assert plan(spec, random_setup(spec, ["16"], PAST)) is None
    assert plan(spec, setup, past_only="window:48").past == replace(PAST, mode="window", window=48)
    for bits, sinks, recent in ((8, 0, 0), (4, 4, 16), (3, 4, 32), (2, 64, 128)):
        free = plan(spec, setup, kv_cache=str(bits))
        assert free.setup is not setup
        assert free.past == PastRule(sink_tokens=sinks, recent_tokens=recent)
        assert {layout.scheme.keys.bits for layout in free.layouts} == {bits}


def test_bits_and_bytes_by_hand(spec) -> None:
    """Two heads of 16: keys and values of 4 bits take 8 bytes and 4 of scale and minimum; 3 bits 8 and 4."""
    found = plan(spec, random_setup(spec, ["4", "16", "K3V16"], PAST))
    # In heads of 16 rows of 3 bits are filled up to 4.
    assert found.key_bits == pytest.approx((4 + 2 + 32 + 4 + 2) / 3)
    assert found.value_bits == pytest.approx((4 + 2 + 32 + 32) / 3)
    four, plain, mixed = layer_page_bytes(spec, found, page_size=16, number_bytes=4)
    assert four == 2 * 2 * 16 * (8 + 4)
    assert plain == 2 * 2 * 16 * 16 * 4
    assert mixed == 2 * 16 * (8 + 4 + 16 * 4)
    sentence = found.sentence()
    assert "past-only token, 3 first tokens exact; 1 layers stay exact; a test" in sentence
    assert sentence.startswith("14.67 bits per number of keys, 23.33 of values")


def test_groups_along_tokens_decide_granule_and_pages(spec) -> None:
    setup = random_setup(spec, ["t16", "4"], replace(PAST, granule=1))
    assert plan(spec, setup).past.granule == 16
    assert plan(spec, setup).keeps_exact_pages
    with pytest.raises(UsageError) as caught:
        plan(spec, setup, page_size=24)
    assert (caught.value.where, caught.value.found) == ("page_size", "24")
    assert "a multiple of 16" in caught.value.expected


def test_pages_hold_whole_groups_along_tokens_where_nobody_gave_a_size(folder, spec) -> None:
    setup = random_setup(spec, ["t16", "4"], PAST)
    wide = LayerScheme(keys=SideScheme(bits=4, group_size=32, axis="token"), values=SideScheme())
    setup = replace(setup, scheme=replace(setup.scheme, layers=(wide, *setup.scheme.layers[1:])))
    assert plan(spec, setup).page_size == 32
    assert plan(spec, random_setup(spec, ["4"], PAST)).page_size == 16
    assert plan(spec, setup, page_size=64).page_size == 64
    with pytest.raises(UsageError, match="a multiple of 32"):
        plan(spec, setup, page_size=16)
    engine = cached_engine(folder, setup, page_size=None)
    assert engine.runner.attend.pool.plan.page_size == 32
    assert outcomes(engine, prompts_of(37)) == outcomes(cached_engine(folder, setup, page_size=32), prompts_of(37))
    assert cached_engine(folder, None, page_size=None).runner.attend.pool.plan.page_size == 16


def test_setups_of_other_models_are_refused(spec) -> None:
    setup = random_setup(spec, ["4"], PAST)
    one_less = replace(setup, layers=setup.layers[:-1])
    other_scheme = replace(setup, scheme=CacheScheme(layers=setup.scheme.layers[:-1], past=PAST))
    heads = LayerParameters(keys=SideParameters(scale_KD=torch.ones(3, 16)), values=SideParameters())
    for wrong, expected, found in (
        (one_less, "3 decoder layers in the parameters", "2"),
        (other_scheme, "3 decoder layers in the scheme", "2"),
        (
            replace(setup, layers=(*setup.layers[:2], heads)),
            "2 heads of 16 features in the keys of layer 2",
            "shape [3, 16]",
        ),
    ):
        with pytest.raises(ModelError) as caught:
            plan(spec, wrong)
        assert (caught.value.expected, caught.value.found) == (expected, found)
        assert "set kv_cache to 16" in caught.value.action


def test_shifts_of_keys_do_not_go_with_capped_scores(tmp_path) -> None:
    spec = model_spec(CheckpointFolder.open(write_cached_model("gemma2-softcaps", tmp_path)))
    setup = random_setup(spec, ["4"], PAST)
    assert plan(spec, setup) is not None
    shifted = replace(setup.layers[1], keys=replace(setup.layers[1].keys, shift_KD=torch.zeros(2, 16)))
    with pytest.raises(ModelError, match="no shift of keys") as caught:
        plan(spec, replace(setup, layers=(setup.layers[0], shifted, *setup.layers[2:])))
    assert caught.value.found == "one in layer 1"


@pytest.mark.parametrize("kv_cache", ["checkpoint", "4"])
def test_heads_that_do_not_split_are_refused(tmp_path, kv_cache) -> None:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == "llama-grouped_query")
    spec = model_spec(CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path)))
    layers = tuple(replace(layer) for layer in spec.layers)
    setup = random_setup(replace(spec, head_dim=8, layers=layers), ["4"], PAST)
    with pytest.raises(ModelError) as caught:
        plan(spec, setup, kv_cache=kv_cache)
    assert (caught.value.found, caught.value.action) == ("4 channels", "Set kv_cache to 16.")
    assert "a multiple of 8" in caught.value.expected


def test_pages_need_a_size_that_codes_take(folder, spec) -> None:
    with pytest.raises(UsageError, match="a multiple of 16"):
        EngineSettings(kv_cache="4", page_size=24)
    with pytest.raises(UsageError, match="a multiple of 16"):
        cached_engine(folder, random_setup(spec, ["4"], PAST), page_size=8)
    assert cached_engine(folder, None, page_size=8).cache is None


def test_names_of_pages_depend_on_all_that_decides_their_content(folder, spec) -> None:
    setup = random_setup(spec, ["4"], PAST)
    engines = [
        cached_engine(folder, None),
        cached_engine(folder, setup),
        cached_engine(folder, replace(setup, fingerprint=sha256(b"other").digest())),
        cached_engine(folder, setup, past_only="off"),
        cached_engine(folder, setup, past_only="window:16"),
        cached_engine(folder, setup, past_only="window:32"),
        cached_engine(folder, replace(setup, scheme=replace(setup.scheme, past=replace(PAST, sink_tokens=4)))),
        cached_engine(folder, random_setup(spec, ["8"], PAST)),
        cached_engine(folder, setup, kv_cache="4"),
        cached_engine(folder, setup, dtype=torch.bfloat16),
    ]
    (prompt,) = prompts_of(40)
    names = []
    for engine in engines:
        assert len(engine.runner.prompt_salt(5)) == 40
        engine.submit(prompt, SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
        engine.step()
        tables = engine.scheduler.tables
        names.append({name for name in tables.allocators[0]._names if name})
        assert len(names[-1]) == 2
    for number, one in enumerate(names):
        assert all(one.isdisjoint(other) for other in names[:number])
    again = cached_engine(folder, random_setup(spec, ["4"], PAST))
    assert again.runner.prompt_salt(5) == engines[1].runner.prompt_salt(5)


def test_the_plan_counts_the_bytes_of_all_storages(folder, spec) -> None:
    engine = cached_engine(folder, random_setup(spec, ["4", "16", "t16"], PAST))
    pool = engine.runner.attend.pool
    tensors = {
        id(tensor): tensor for group in range(len(pool.plan.groups)) for tensor in pool.tensors_of(group)
    }.values()
    assert sum(tensor.nbytes for tensor in tensors) == pool.plan.num_bytes
    assert isinstance(pool.layers[1], LayerPages)
    exact = pool.plan.groups[pool.exact_group]
    assert (exact.layers, exact.num_sinks, exact.window) == ((0, 2), 3, 16)
    layout = pool.layers[0].layout
    assert isinstance(layout, PageLayout)
    assert pool.layers[0].pages_ZB.shape == (pool.plan.num_pages[0], layout.page_bytes)


def test_the_log_says_what_is_stored(folder, spec, caplog) -> None:
    with caplog.at_level(logging.INFO):
        cached_engine(folder, random_setup(spec, ["4"], PAST))
    assert "6.00 bits per number of keys, 6.00 of values, past-only token, 3 first tokens exact; a test" in caplog.text
    # Three layers of two heads of 16: 12 bytes for 16 numbers.
    assert "144.0 bytes per token, 768.0 as computed" in caplog.text
    assert "kernel for attention over codes" in caplog.text
    caplog.clear()
    cached_engine(folder, None, past_only="token")
    assert "past_only does nothing" in caplog.text
    caplog.clear()
    cached_engine(folder, random_setup(spec, ["4"], PAST), kv_cache="16", past_only="token")
    assert "past_only does nothing" in caplog.text


def test_a_folder_with_a_scheme(tmp_path) -> None:
    folder = write_cached_model("llama-grouped_query", tmp_path)
    spec = model_spec(CheckpointFolder.open(folder))
    setup = random_setup(spec, ["4"], PAST)
    write_cache_setup(folder, setup.scheme, setup.layers, folded={}, calibration={})
    loaded = load_for_engine(folder)
    assert loaded.cache is not None
    assert loaded.cache.scheme == setup.scheme
    prompts = prompts_of(20)
    assert outcomes(cached_engine(folder, loaded.cache), prompts) == outcomes(cached_engine(folder, setup), prompts)
    # What cannot be read is the explicit way out's own business.
    (folder / "kv_cache" / "kv_params.safetensors").unlink()
    with pytest.raises(OptGPTQError, match="kv_params"):
        load_for_engine(folder)
    assert load_for_engine(folder, settings=EngineSettings(kv_cache="4")).cache is None


def test_settings_with_another_cache() -> None:
    base = EngineSettings(max_running=3)
    assert with_cache(base, None, None) is base
    changed = with_cache(base, "4", "token")
    assert (changed.kv_cache, changed.past_only, changed.max_running) == ("4", "token", 3)
    assert with_cache(None, None, None) == EngineSettings()


def test_a_text_may_have_one_token_more_than_the_model_has_positions(folder, spec, caplog) -> None:
    assert spec.max_position is not None
    with caplog.at_level(logging.WARNING):
        cached_engine(folder, None, max_length=spec.max_position + 1)
        assert not caplog.messages
        cached_engine(folder, None, max_length=spec.max_position + 2)
    assert any("they get worse beyond them" in message for message in caplog.messages)
