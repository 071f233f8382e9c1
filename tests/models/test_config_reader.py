"""Typed reading of config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from optgptq.errors import ModelError
from optgptq.models.config_reader import ConfigReader


def test_the_first_spelling_with_a_value_wins_and_all_count_as_read() -> None:
    config = ConfigReader({"num_layers": None, "n_layer": 3, "hidden_layers": 4})
    assert config.integer("num_layers", "n_layer", "hidden_layers") == 3
    config.finish()


def test_null_and_absent_differ_only_for_optional_values() -> None:
    config = ConfigReader({"window": None})
    assert config.optional_integer("window", absent=7) is None
    assert config.optional_integer("other", absent=7) == 7
    assert config.optional_number("window", absent=0.5) is None
    assert config.optional_number("other", absent=0.5) == 0.5
    assert config.integer("window", default=9) == 9


@pytest.mark.parametrize(
    ("read", "where", "expected", "found"),
    [
        (lambda c: c.integer("absent"), "absent", "a whole number of at least 1", "no value"),
        (lambda c: c.integer("text"), "text", "a whole number of at least 1", "'4'"),
        (lambda c: c.integer("zero"), "zero", "a whole number of at least 1", "0"),
        (lambda c: c.integer("yes"), "yes", "a whole number of at least 1", "True"),
        (lambda c: c.number("text"), "text", "a number", "'4'"),
        (lambda c: c.number("nan"), "nan", "a number", "nan"),
        (lambda c: c.flag("zero", default=True), "zero", "true or false", "0"),
        (lambda c: c.choice("text", allowed=("b", "a")), "text", "one of a, b", "'4'"),
        (lambda c: c.section("text"), "text", "an object", "'4'"),
        (lambda c: c.require("text", False, None), "text", "False or None", "'4'"),
    ],
)
def test_values_of_another_kind_are_refused(
    read: Callable[[ConfigReader], Any], where: str, expected: str, found: str
) -> None:
    config = ConfigReader({"text": "4", "zero": 0, "yes": True, "nan": float("nan")})
    with pytest.raises(ModelError) as caught:
        read(config)
    assert caught.value.where == f"config.json: {where}"
    assert (caught.value.expected, caught.value.found) == (expected, found)


@pytest.mark.parametrize(
    "key", ["num_local_experts", "logits_scaling", "residual_multiplier", "attention_sink", "use_qk_norm"]
)
def test_unread_keys_that_speak_of_arithmetic_are_refused_when_set(key: str) -> None:
    ConfigReader({key: None}).finish()
    ConfigReader({key: False}).finish()
    with pytest.raises(ModelError, match=key):
        ConfigReader({key: 2}).finish()
    ConfigReader({key: 2}).finish(key)


def test_bookkeeping_keys_are_left_alone() -> None:
    ConfigReader(
        {
            "architectures": ["X"],
            "torch_dtype": "bfloat16",
            "quantization_config": {"bits": 4},
            "transformers_version": "4.40",
            "unsloth_version": "2024.9",
            "attention_dropout": 0.1,
            "auto_map": {"AutoConfig": "x"},
            "initializer_range": 0.02,
            "pretraining_tp": 1,
        }
    ).finish()


def test_strict_sections_refuse_every_unread_key() -> None:
    section = ConfigReader({"a": {"b": 1, "c": 2}}).section("a")
    assert section is not None
    assert section.integer("b") == 1
    with pytest.raises(ModelError, match=r"config\.json: a: c"):
        section.finish_strictly()
