"""`NAME=VALUE` into settings: types, nearest names, and the real text of errors."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optgptq.errors import OptGPTQError, UsageError
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.field_values import (
    SAMPLING_FIELDS,
    SETTING_FIELDS,
    engine_settings,
    field_values,
    sampling_params,
)
from optgptq.scheduling.sampling_params import SamplingParams


def test_values_are_yaml_and_the_last_one_counts() -> None:
    texts = ["max_running=4", "max_running = 8", "max_length=null", "watermark_ratio=1e-2", "prefix_cache=false"]
    values = field_values(texts, SETTING_FIELDS, option="--set")
    assert values == {"max_running": 8, "max_length": None, "watermark_ratio": 0.01, "prefix_cache": False}
    assert engine_settings(values) == EngineSettings(max_running=8, watermark_ratio=0.01, prefix_cache=False)


def test_a_whole_number_is_a_number() -> None:
    assert engine_settings({"memory_share": 1}).memory_share == 1


@pytest.mark.parametrize(
    ("text", "where", "expected", "action"),
    [
        ("max_runing=3", "--set max_runing=3", "a known name; the nearest is max_running", "Use one of page_size, "),
        ("zzz=3", "--set zzz=3", "a known name", "Use one of page_size, "),
        ("page_size", "--set page_size", "NAME=VALUE", "Write --set NAME=VALUE."),
        ("page_size=[", "--set page_size=[ line 1", "valid YAML", "Correct this line"),
    ],
)
def test_what_cannot_be_read(text: str, where: str, expected: str, action: str) -> None:
    with pytest.raises(UsageError) as caught:
        field_values([text], SETTING_FIELDS, option="--set")
    assert (caught.value.where, caught.value.expected) == (where, expected)
    assert caught.value.action.startswith(action)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("page_size", "16", "a whole number or null"),
        ("page_size", True, "a whole number or null"),
        ("page_size", 16.0, "a whole number or null"),
        ("max_length", "long", "a whole number or null"),
        ("memory_share", [0.5], "a number or null"),
        ("deterministic", 1, "true or false"),
        ("watermark_ratio", False, "a number"),
        ("page_size", 12, "a multiple of 8"),
        ("kv_cache", 5, "one of checkpoint, 16, 8, 4, 3, 2"),
        ("kv_cache", 4.0, "text"),
        ("past_only", 3, "text or null"),
        ("past_only", True, "text or null"),
    ],
)
def test_what_an_engine_cannot_take(name: str, value: object, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        engine_settings({name: value})
    assert (caught.value.where, caught.value.expected) == (name, expected)


def test_caches_as_yaml_reads_them() -> None:
    texts = ["kv_cache=4", "past_only=off"]
    settings = engine_settings(field_values(texts, SETTING_FIELDS, option="--set"))
    assert (settings.kv_cache, settings.past_only) == ("4", "off")
    settings = engine_settings(field_values(["past_only=window:32"], SETTING_FIELDS, option="--set"))
    assert settings.past_only == "window:32"


@given(name=st.sampled_from(SETTING_FIELDS), text=st.text(alphabet="0123456789.-+eE truefalsn[]{}:,'\"#~", max_size=8))
def test_any_text_gives_settings_or_one_of_our_errors(name: str, text: str) -> None:
    with suppress(OptGPTQError):
        settings = engine_settings(field_values([f"{name}={text}"], SETTING_FIELDS, option="--set"))
        assert settings.page_size is None or settings.page_size % 8 == 0


def test_every_sampling_parameter_but_functions_can_be_named() -> None:
    assert "logits_processors" not in SAMPLING_FIELDS
    texts = ["logit_bias={5: 1.5, 6: -2}", "stop_token_ids=[1, 2]", "stop=x", "detokenize=true"]
    params = sampling_params(field_values(texts, SAMPLING_FIELDS, option="--param"))
    assert params == SamplingParams(logit_bias={5: 1.5, 6: -2}, stop_token_ids=[1, 2], stop="x")
    with pytest.raises(UsageError, match="logit_bias"):
        sampling_params({"logit_bias": {"five": 1.0}})
