"""Sampling parameters: vLLM's names and defaults, and every value that is refused."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import pytest

from optgptq.errors import UsageError
from optgptq.scheduling.sampling_params import CHECKS, SamplingParams

DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": (),
    "stop_token_ids": (),
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "logit_bias": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "logits_processors": (),
}


def keep(prompt_ids, output_ids, logits_V):
    return logits_V


def test_names_and_defaults():
    params = SamplingParams()
    assert {field.name: getattr(params, field.name) for field in dataclasses.fields(params)} == DEFAULTS
    assert set(CHECKS) == set(DEFAULTS)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [0, -1, 1.0, "1", True, None]),
        ("presence_penalty", [-2.1, 2.1, float("nan"), "0", None, False]),
        ("frequency_penalty", [-3, 2.0001, float("inf"), [0.0]]),
        ("repetition_penalty", [0, -1.0, float("nan"), float("inf"), 10**400, True]),
        ("temperature", [-0.1, float("nan"), float("inf"), "hot", True, None]),
        ("top_p", [0, 0.0, 1.1, -1, float("nan"), "0.5"]),
        ("top_k", [-2, 1.5, "5", True, None]),
        ("min_p", [-0.1, 1.1, float("nan"), None]),
        ("seed", [-1, 2**63, 1.0, "1", True]),
        ("stop", ["", ["a", ""], [1], b"a", {"a"}, 3]),
        ("stop_token_ids", [[-1], [1.0], [True], "12", 7, {1}]),
        ("ignore_eos", [1, 0, None, "yes"]),
        ("max_tokens", [0, -1, 1.0, "16", True]),
        ("min_tokens", [-1, 1.5, None, True]),
        ("logprobs", [-1, 1.5, True, "5"]),
        ("logit_bias", [{-1: 0.0}, {1: float("inf")}, {1: "x"}, {"1": 1.0}, {True: 1.0}, [(1, 1.0)]]),
        ("detokenize", [1, None]),
        ("skip_special_tokens", [0, "no"]),
        ("include_stop_str_in_output", [None, 1]),
        ("logits_processors", [[1], keep, "abc"]),
    ],
)
def test_impossible_values_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(UsageError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.where == name
        assert caught.value.found == repr(value)
        assert caught.value.action == "Change this sampling parameter, or leave it out."


@pytest.mark.parametrize(
    "values",
    [
        {"n": 5, "temperature": 0},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 1},
        {"top_k": -1, "top_p": 1, "min_p": 1},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"max_tokens": None, "min_tokens": 100},
        {"min_tokens": 16},
        {"logprobs": 0},
        {"logit_bias": {}},
        {"stop": [], "detokenize": False},
    ],
)
def test_values_at_the_edges_are_taken(values):
    params = SamplingParams(**values)
    assert {name: getattr(params, name) for name in values if name != "stop"} == {
        name: value for name, value in values.items() if name != "stop"
    }


def test_sequences_become_tuples_and_mappings_are_copied():
    stops, bias = ["a", "b"], {3: 1.0}
    params = SamplingParams(stop=stops, stop_token_ids=[4, 5], logit_bias=bias, logits_processors=[keep])
    stops.append("c")
    bias[4] = 2.0
    assert params.stop == params.stop_strings == ("a", "b")
    assert params.stop_token_ids == params.stop_ids == (4, 5)
    assert params.logits_processors == params.processors == (keep,)
    assert params.logit_bias == {3: 1.0}
    assert SamplingParams(stop="one").stop_strings == ("one",)


def test_a_record_can_be_varied_compared_and_sent():
    params = SamplingParams(stop="x", logit_bias={1: 2.0})
    assert dataclasses.replace(params, temperature=0.0).stop_strings == ("x",)
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2


def test_values_that_contradict_each_other():
    with pytest.raises(UsageError, match=r"min_tokens: expected at most max_tokens \(16\), found 17\."):
        SamplingParams(min_tokens=17)
    with pytest.raises(UsageError, match="stop: expected no stop strings where detokenize is False"):
        SamplingParams(stop="a", detokenize=False)


def test_zero_temperature_is_greedy():
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy


@pytest.mark.parametrize(
    ("values", "where", "found"),
    [
        ({"stop_token_ids": [1, 10]}, "stop_token_ids", "10"),
        ({"logit_bias": {9: 1.0, 11: 1.0}}, "logit_bias", "11"),
        ({"logprobs": 11}, "logprobs", "11"),
    ],
)
def test_the_vocabulary_decides_which_ids_there_are(values, where, found):
    params = SamplingParams(**values)
    params.check_against(12)
    with pytest.raises(UsageError) as caught:
        params.check_against(10)
    assert (caught.value.where, caught.value.found) == (where, found)
    assert "vocabulary size 10" in caught.value.expected


def test_no_torch_is_loaded():
    code = "import sys, optgptq.scheduling.sampling_params; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
