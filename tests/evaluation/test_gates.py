"""Quality gates: which pass, which are missed, and by how much."""

from __future__ import annotations

import math

import pytest

from optgptq.errors import GateError, InputError, UsageError
from optgptq.evaluation.gates import (
    Figure,
    Gate,
    gates_of_options,
    gates_of_recipe,
    judge,
    measured_figures,
    require_baseline,
    require_passed,
)
from optgptq.evaluation.perplexity import EvalResult
from optgptq.recipe.gates import GATES, GatesRecipe

RESULT = EvalResult(perplexity=5.5, baseline_perplexity=5.0, mean_kl=0.04, top1_agreement=0.9, num_tokens=100)
# A limit, a figure within it and one beyond it.
CASES = {name: (0.5, 0.75, 0.25) if kind.at_least else (0.5, 0.25, 0.75) for name, kind in GATES.items()}


def gate(name: str, limit: float) -> Gate:
    return Gate(kind=GATES[name], limit=limit, asked_as=f"gates.{name}")


def outcome_of(name: str, limit: float, value: float, where: str | None = None):
    (outcome,) = judge([gate(name, limit)], {name: Figure(value=value, where=where)})
    return outcome


@pytest.mark.parametrize("name", GATES)
def test_a_figure_within_the_limit_or_exactly_at_it_passes(name):
    limit, good, _ = CASES[name]
    for value in (good, limit):
        outcome = outcome_of(name, limit, value)
        assert outcome.passed
        assert (outcome.value, outcome.limit, outcome.excess, outcome.problem) == (value, limit, 0, None)
        require_passed([outcome])


@pytest.mark.parametrize("name", GATES)
def test_a_missed_gate_says_value_limit_place_and_by_how_much(name):
    limit, _, bad = CASES[name]
    outcome = outcome_of(name, limit, bad, "decoder layer 3")
    assert not outcome.passed
    assert outcome.excess == 0.25
    with pytest.raises(GateError) as caught:
        require_passed([outcome])
    assert caught.value.exit_code == 7
    assert caught.value.where == f"quality gate gates.{name}"
    assert caught.value.expected == f"{GATES[name].figure} {GATES[name].bound} 0.5"
    assert caught.value.found == f"{bad:g} in decoder layer 3 (missed by 0.25)"
    assert caught.value.action == GATES[name].advice


@pytest.mark.parametrize("name", GATES)
def test_a_figure_that_is_not_a_number_never_passes(name):
    outcome = outcome_of(name, 0.5, math.nan)
    assert not outcome.passed
    with pytest.raises(GateError, match="nan"):
        require_passed([outcome])


@pytest.mark.parametrize("name", [name for name, kind in GATES.items() if not kind.at_least])
def test_an_infinite_figure_does_not_pass(name):
    assert not outcome_of(name, 0.5, math.inf).passed


@pytest.mark.parametrize("name", GATES)
def test_a_missing_figure_never_passes(name):
    error = InputError("record", expected="a figure", found="none", action="Do it again.")
    for figures in ({}, {name: error}):
        (outcome,) = judge([gate(name, 0.5)], figures)
        assert not outcome.passed
        assert math.isnan(outcome.value)
        assert outcome.problem == ("it was not measured" if not figures else str(error))
        with pytest.raises(GateError, match="no figure"):
            require_passed([outcome])


def test_an_evaluation_gives_the_measured_figures():
    figures = measured_figures(RESULT, seconds=2.0)
    assert {name: figure.value for name, figure in figures.items()} == {
        "max_perplexity": 5.5,
        "max_kl": 0.04,
        "min_top1": 0.9,
        "max_perplexity_increase": 0.1,
    }
    assert {figure.seconds for figure in figures.values()} == {2.0}
    assert set(figures) == {name for name, kind in GATES.items() if kind.is_measured}
    alone = EvalResult(perplexity=math.inf, baseline_perplexity=None, mean_kl=None, top1_agreement=None, num_tokens=1)
    assert list(measured_figures(alone)) == ["max_perplexity"]


def test_an_increase_that_is_exactly_the_limit_passes():
    assert 5.5 / 5.0 - 1 > 0.1
    assert all(outcome.passed for outcome in judge([gate("max_perplexity_increase", 0.1)], measured_figures(RESULT)))


def test_all_missed_gates_are_named_in_one_message():
    gates = gates_of_options([], {"max_perplexity": 9.0, "max_kl": 0.001, "min_top1": 0.99})
    with pytest.raises(GateError) as caught:
        require_passed(judge(gates, measured_figures(RESULT)))
    assert caught.value.where == "quality gate --max-kl, --min-top1"
    assert caught.value.expected == "mean KL in nats per token at most 0.001; top-1 agreement at least 0.99"
    assert caught.value.found == "0.04 (missed by 0.039); 0.9 (missed by 0.09)"


def test_an_outcome_is_told_in_words_and_as_a_record():
    assert outcome_of("max_kl", 0.1, 0.05).verdict == "passed: 0.05 against 0.1"
    assert outcome_of("max_linear_loss", 0.1, 0.3, "down").verdict == "missed by 0.2: 0.3 against 0.1 (down)"
    assert outcome_of("max_linear_loss", 0.1, 0.3, "down").record() == {
        "gate": "gates.max_linear_loss",
        "name": "max_linear_loss",
        "figure": "loss of a linear",
        "unit": "share of its output",
        "value": 0.3,
        "limit": 0.1,
        "passed": False,
        "excess": pytest.approx(0.2),
        "where": "down",
        "problem": None,
        "seconds": 0.0,
        "at_least": False,
    }


def test_gates_of_a_command_line_come_in_the_order_of_the_list():
    gates = gates_of_options(["max_damp_ratio=0.1", " max_perplexity = 7 "], {"max_kl": 0.2, "min_top1": None})
    assert [(each.kind.name, each.limit, each.asked_as) for each in gates] == [
        ("max_perplexity", 7.0, "--gate max_perplexity"),
        ("max_kl", 0.2, "--max-kl"),
        ("max_damp_ratio", 0.1, "--gate max_damp_ratio"),
    ]


def test_gates_of_a_recipe():
    gates = gates_of_recipe(GatesRecipe(text="a.txt", max_kl=0.2, min_tokens_per_linear=64))
    assert [(each.kind.name, each.limit, each.asked_as) for each in gates] == [
        ("max_kl", 0.2, "gates.max_kl"),
        ("min_tokens_per_linear", 64.0, "gates.min_tokens_per_linear"),
    ]


@pytest.mark.parametrize(
    ("texts", "options", "where", "hint"),
    [
        (["max_kll=1"], {}, "--gate max_kll=1", "Did you mean max_kl?"),
        (["zzz=1"], {}, "--gate zzz=1", "Write --gate max_kl=0.02 for example."),
        (["max_kl"], {}, "--gate max_kl", "Write --gate max_kl=0.02 for example."),
        (["max_kl=low"], {}, "--gate max_kl=low", "Write --gate max_kl=0.02 for example."),
        (["max_kl=nan"], {}, "--gate max_kl", "Give a limit such as 0.02."),
        (["max_kl=inf"], {}, "--gate max_kl", "Give a limit such as 0.02."),
        (["max_dense_share=2"], {}, "--gate max_dense_share", "Give 0.98 for 98 percent."),
        (["max_kl=1"], {"max_kl": 0.1}, "--gate max_kl=1", "Leave one of them out."),
        (["max_kl=1", "max_kl=2"], {}, "--gate max_kl=2", "Leave one of them out."),
        ([], {"max_perplexity": math.nan}, "--max-ppl", "Give a limit such as 0.02."),
        ([], {"max_kl": -0.1}, "--max-kl", "Give a limit such as 0.02."),
        ([], {"min_top1": 1.5}, "--min-top1", "Give 0.98 for 98 percent."),
    ],
)
def test_gates_that_make_no_sense_are_refused(texts, options, where, hint):
    with pytest.raises(UsageError) as caught:
        gates_of_options(texts, options)
    assert caught.value.where == where
    assert caught.value.action == hint


def test_gates_that_compare_need_a_baseline():
    require_baseline(gates_of_options(["max_dense_share=0"], {"max_perplexity": 3.0}), has_baseline=False)
    comparing = gates_of_options([], {"max_perplexity": 3.0, "max_kl": 0.1, "min_top1": 0.5})
    require_baseline(comparing, has_baseline=True)
    with pytest.raises(UsageError) as caught:
        require_baseline(comparing, has_baseline=False)
    assert caught.value.where == "--max-kl, --min-top1"
