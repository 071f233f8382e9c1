"""Choosing tokens: against the sampler written out literally, rows for themselves, failures for themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.slow_sampling import row_of, slow_adjusted, slow_probabilities

from optgptq.errors import NumericalError, UsageError
from optgptq.runtime import sampler, truncation
from optgptq.runtime.counter_random import uniforms
from optgptq.runtime.sampler import SampledToken, sample
from optgptq.scheduling.sampling_params import SamplingParams

VOCAB = 13
GREEDY = SamplingParams(temperature=0.0)
# Multiples of 1/4 make ties; 30 apart makes tokens that are never drawn.
LOGITS = st.lists(st.integers(-30, 30).map(lambda value: value / 4), min_size=VOCAB, max_size=VOCAB)
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=6)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, 12, 13, 40]),
    top_p=st.sampled_from([1.0, 0.97, 0.6, 0.2, 1e-9]),
    min_p=st.sampled_from([0.0, 0.07, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.9]),
    presence_penalty=st.sampled_from([0.0, -1.3, 0.9]),
    frequency_penalty=st.sampled_from([0.0, -0.7, 1.1]),
    logit_bias=st.none() | st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3),
    min_tokens=st.integers(0, 5),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=2),
    logprobs=st.none() | st.integers(0, VOCAB),
)
ROWS = st.builds(
    row_of,
    PARAMS,
    prompt=IDS,
    output=IDS,
    seed=st.integers(0, 2**62),
    fork=st.integers(0, 3),
    eos=IDS.map(lambda i: i[:2]),
)


def chosen(logits: list[float], row) -> int:
    return sample(torch.tensor([logits]), [row])[0].token_id


@settings(max_examples=250, deadline=None)
@given(logits=LOGITS, row=ROWS)
def test_the_token_is_the_one_of_the_literal_sampler(logits, row):
    changed = slow_adjusted(logits, row)
    assume(max(changed) > -torch.inf)
    # Bias and penalties round in float32, which may part what is equal in float64: close decisions are left out then.
    is_exact = changed == [logit if value > -torch.inf else value for logit, value in zip(logits, changed, strict=True)]
    found = chosen(logits, row)
    if row.params.is_greedy:
        close = [token for token, value in enumerate(changed) if value > max(changed) - 1e-4]
        assert found == close[0] if is_exact else found in close
        return
    assume(is_exact or not _is_close_call(changed, row.params))
    probabilities = slow_probabilities(changed, row.params)
    uniform = uniforms([row.seed], [row.fork], [len(row.output_ids)])[0]
    cumulative = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)
    assume(all(abs(float(edge) - uniform) > 1e-4 for edge in cumulative[:-1]))
    assert found == int((cumulative <= uniform).sum())


def _is_close_call(logits: list[float], params: SamplingParams) -> bool:
    """True where changes of 1e-5 to the logits change which tokens are kept."""
    kept = [probability > 0 for probability in slow_probabilities(logits, params)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        noise = (torch.rand(len(logits), generator=generator, dtype=torch.float64) * 2e-5 - 1e-5).tolist()
        moved = [logit + change for logit, change in zip(logits, noise, strict=True)]
        if [probability > 0 for probability in slow_probabilities(moved, params)] != kept:
            return True
    return False


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(2, 6))
def test_a_row_does_not_depend_on_the_others(data, count):
    rows = [data.draw(ROWS) for _ in range(count)]
    logits = torch.tensor([data.draw(LOGITS) for _ in range(count)])
    together = sample(logits, rows)
    alone = [sample(logits[index : index + 1], [rows[index]])[0] for index in range(count)]
    assert [without_error(token) for token in together] == [without_error(token) for token in alone]


def without_error(token: SampledToken) -> tuple:
    return token.token_id, token.logprob, token.top_logprobs, token.error is None


def frequencies(params: SamplingParams, logits: list[float], *, draws: int = 4000) -> torch.Tensor:
    rows = [row_of(params, fork=fork) for fork in range(draws)]
    tokens = [token.token_id for token in sample(torch.tensor(logits).expand(draws, -1), rows)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_many_draws_give_the_softmax(temperature):
    logits = [0.0, 2.0, 1.0, -1.0]
    expected = torch.softmax(torch.tensor(logits) / temperature, dim=-1)
    found = frequencies(SamplingParams(temperature=temperature), logits)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"top_k": 2}, [0, 5 / 8, 3 / 8, 0]),
        ({"top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 5 / 8, 3 / 8, 0]),
        ({"top_p": 0.85}, [1 / 9, 5 / 9, 3 / 9, 0]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"min_p": 0.5}, [0, 5 / 8, 3 / 8, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.55}, [0, 1, 0, 0]),  # of the 0.9 that top-k leaves
    ],
)
def test_what_is_kept_keeps_its_proportions(values, expected):
    probabilities = torch.tensor([0.1, 0.5, 0.3, 0.1])
    found = frequencies(SamplingParams(**values), (probabilities.log() + 1e-6).tolist())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "values", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-320, "top_k": 1}]
)
def test_the_first_of_equally_likely_tokens(values):
    assert chosen([0.0, 3.0, 3.0, 1.0, 3.0], row_of(SamplingParams(**values), seed=5)) == 1


@pytest.mark.parametrize(("temperature", "expected"), [(1e-310, {3}), (1e-30, {3}), (1e30, {3}), (1e308, {0, 1, 2, 3})])
def test_no_temperature_overflows(temperature, expected):
    params = SamplingParams(temperature=temperature)
    assert {chosen([0.0, 3.0, -3e38, 3e38], row_of(params, fork=fork)) for fork in range(60)} == expected


def test_top_p_that_is_reached_exactly_keeps_no_further_token():
    found = frequencies(SamplingParams(top_p=0.5), [1.0] * 4, draws=100)
    assert (found > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (1 - 2**-53, 3)])
def test_the_outermost_random_numbers_take_tokens_that_are_possible(monkeypatch, uniform, expected):
    monkeypatch.setattr(sampler, "uniforms", lambda *places: np.array([uniform]))
    assert chosen([-torch.inf, 0.0, 0.0, 0.0, -torch.inf], row_of(SamplingParams())) == expected


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_top_p_looks_beyond_the_first_candidates(top_p):
    vocab = 3001
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(1)) * 0.01
    params = SamplingParams(top_p=top_p)
    rows = [row_of(params), row_of(SamplingParams(top_p=1.0))]
    weights = sampler._weights(logits, logits.amax(-1), [row.params for row in rows])
    probabilities = torch.softmax(logits[0].double(), dim=-1)
    order = torch.argsort(logits[0], descending=True, stable=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    kept = set(order[before < top_p].tolist())
    assert len(kept) > truncation.FIRST_CANDIDATES or top_p == 0.3
    assert set(weights[0].nonzero().squeeze(1).tolist()) == kept
    assert int((weights[1] > 0).sum()) == vocab


def test_blocks_of_rows_give_the_same(monkeypatch):
    logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(2))
    rows = [row_of(SamplingParams(top_p=0.9), seed=seed) for seed in range(7)]
    whole = sample(logits, rows)
    monkeypatch.setattr(sampler, "BLOCK_LOGITS", 2 * VOCAB)
    assert sample(logits, rows) == whole


def test_logits_and_the_global_generator_are_left_alone():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))
    before, state = logits.clone(), torch.random.get_rng_state()
    params = SamplingParams(logit_bias={1: 2.0}, presence_penalty=1.0, min_tokens=3, top_k=4, logprobs=2)
    sample(logits, [row_of(params, output=[1, 2], eos=[5])] * 3)
    assert torch.equal(logits, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_rows():
    assert sample(torch.zeros(0, 5), []) == []


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.5, logprobs=2), SamplingParams(min_tokens=2)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_fail_their_row_only(params, bad):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    rows = [row_of(params, seed=seed, eos=[1]) for seed in range(3)]
    healthy = sample(logits, rows)
    logits[1, 4] = bad
    tokens = sample(logits, rows)
    assert [tokens[0], tokens[2]] == [healthy[0], healthy[2]]
    error = tokens[1].error
    assert isinstance(error, NumericalError)
    assert str(error) == (
        f"logits: expected numbers, the greatest of them finite, found {bad}. "
        "Check the checkpoint with `optgptq verify`."
    )
    assert (tokens[1].token_id, tokens[1].logprob) == (0, None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_left_fails_alone(temperature):
    logits = torch.zeros(2, 3)
    empty = SamplingParams(temperature=temperature, min_tokens=1, stop_token_ids=[0, 1, 2])
    tokens = sample(logits, [row_of(empty), row_of(GREEDY)])
    assert tokens[1] == SampledToken(token_id=0)
    assert isinstance(tokens[0].error, UsageError)
    assert tokens[0].error.found == "no token that can be chosen"
    tiny_penalty = SamplingParams(temperature=temperature, repetition_penalty=1e-40)
    (token,) = sample(torch.ones(1, 3), [row_of(tiny_penalty, prompt=[0])])
    assert isinstance(token.error, UsageError)
    assert token.error.action == (
        "Change logits_processors, logit_bias, min_tokens or the penalties so that some token is left."
    )
    tokens = sample(torch.full((1, 3), -torch.inf), [row_of(GREEDY)])
    assert isinstance(tokens[0].error, NumericalError)
