"""Quality gates: which pass, which are missed, and by how much."""

from __future__ import annotations

import math

import pytest

from optgptq.errors import GateError, UsageError
from optgptq.evaluation.gates import Gates, judge, require_baseline, require_passed
from optgptq.evaluation.perplexity import EvalResult

RESULT = EvalResult(perplexity=5.5, baseline_perplexity=5.0, mean_kl=0.04, top1_agreement=0.9, num_tokens=100)


@pytest.mark.parametrize(
    ("gates", "value", "excess"),
    [
        (Gates(max_ppl=5.25), 5.5, 0.25),
        (Gates(max_ppl_increase=0.06), 0.1, 0.04),
        (Gates(max_kl=0.01), 0.04, 0.03),
        (Gates(min_top1=0.95), 0.9, 0.05),
    ],
)
def test_a_missed_gate_says_value_limit_and_by_how_much(gates, value, excess):
    (outcome,) = judge(RESULT, gates)
    assert not outcome.passed
    assert outcome.value == pytest.approx(value)
    assert outcome.excess == pytest.approx(excess)
    with pytest.raises(GateError) as caught:
        require_passed((outcome,))
    assert caught.value.exit_code == 7
    assert outcome.gate in caught.value.where
    assert f"{outcome.limit:.6g}" in caught.value.expected
    assert caught.value.found == f"{value:.6g} (missed by {excess:.6g})"


@pytest.mark.parametrize(
    "gates",
    [Gates(max_ppl=5.5), Gates(max_ppl_increase=0.11), Gates(max_kl=0.04), Gates(min_top1=0.9), Gates()],
)
def test_a_limit_that_is_reached_exactly_passes(gates):
    outcomes = judge(RESULT, gates)
    assert all(outcome.passed and outcome.excess == 0 for outcome in outcomes)
    require_passed(outcomes)


def test_all_missed_gates_are_named_in_one_message():
    with pytest.raises(GateError) as caught:
        require_passed(judge(RESULT, Gates(max_ppl=9.0, max_kl=0.001, min_top1=0.99)))
    assert caught.value.where == "quality gate --max-kl, --min-top1"
    assert caught.value.expected == "mean KL in nats per token at most 0.001; top-1 agreement at least 0.99"


def test_a_figure_that_is_not_a_number_never_passes():
    broken = EvalResult(perplexity=math.nan, baseline_perplexity=None, mean_kl=None, top1_agreement=None, num_tokens=1)
    assert [outcome.passed for outcome in judge(broken, Gates(max_ppl=100))] == [False]
    infinite = EvalResult(
        perplexity=math.inf, baseline_perplexity=None, mean_kl=None, top1_agreement=None, num_tokens=1
    )
    assert [outcome.passed for outcome in judge(infinite, Gates(max_ppl=100))] == [False]


def test_gates_that_compare_need_a_baseline():
    require_baseline(Gates(max_ppl=3.0), has_baseline=False)
    require_baseline(Gates(max_kl=3.0), has_baseline=True)
    with pytest.raises(UsageError) as caught:
        require_baseline(Gates(max_ppl=3.0, max_kl=0.1, min_top1=0.5), has_baseline=False)
    assert caught.value.where == "--max-kl, --min-top1"


@pytest.mark.parametrize(
    ("values", "where"),
    [({"max_ppl": math.nan}, "--max-ppl"), ({"max_kl": -0.1}, "--max-kl"), ({"min_top1": 1.5}, "--min-top1")],
)
def test_limits_that_make_no_sense_are_refused(values, where):
    with pytest.raises(UsageError) as caught:
        Gates(**values)
    assert caught.value.where == where
