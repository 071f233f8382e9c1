"""Logprobs: of the model's own distribution, with ranks that do not depend on what topk does with equal values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.slow_sampling import row_of

from optgptq.runtime.sampler import SampledToken, TokenLogprob, sample
from optgptq.scheduling.sampling_params import SamplingParams

VOCAB = 9


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.integers(-6, 6).map(lambda value: value / 2), min_size=VOCAB, max_size=VOCAB),
    count=st.integers(0, VOCAB),
    seed=st.integers(0, 1000),
)
def test_the_likeliest_tokens_by_rank_and_the_chosen_one(logits, count, seed):
    # Everything that changes the choice leaves the report alone.
    params = SamplingParams(logprobs=count, temperature=3.0, logit_bias={1: 2.0}, presence_penalty=1.0)
    token = sample(torch.tensor([logits]), [row_of(params, output=[2], seed=seed)])[0]
    exact = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=-1)
    order = sorted(range(VOCAB), key=lambda token_id: (-logits[token_id], token_id))
    expected = order[:count] + [token.token_id] * (token.token_id not in order[:count])
    assert [entry.token_id for entry in token.top_logprobs] == expected
    assert [entry.rank for entry in token.top_logprobs] == [order.index(token_id) + 1 for token_id in expected]
    for entry in token.top_logprobs:
        assert entry.logprob == pytest.approx(exact[entry.token_id].item(), abs=1e-5)
    assert token.logprob == pytest.approx(exact[token.token_id].item(), abs=1e-5)


def test_rows_that_want_different_numbers_of_them():
    logits = torch.tensor([[0.0, 1.0, 2.0]] * 4)
    wanted = [None, 0, 2, 1]
    tokens = sample(logits, [row_of(SamplingParams(temperature=0.0, logprobs=count)) for count in wanted])
    logprobs = torch.log_softmax(logits[0], dim=-1).tolist()
    first = TokenLogprob(token_id=2, logprob=logprobs[2], rank=1)
    second = TokenLogprob(token_id=1, logprob=logprobs[1], rank=2)
    assert tokens == [
        SampledToken(token_id=2),
        SampledToken(token_id=2, logprob=logprobs[2], top_logprobs=(first,)),
        SampledToken(token_id=2, logprob=logprobs[2], top_logprobs=(first, second)),
        SampledToken(token_id=2, logprob=logprobs[2], top_logprobs=(first,)),
    ]


def test_tokens_that_the_model_rules_out_come_last():
    params = SamplingParams(temperature=0.0, logprobs=3)
    token = sample(torch.tensor([[-torch.inf, 0.0, -torch.inf]]), [row_of(params)])[0]
    assert [(entry.token_id, entry.logprob) for entry in token.top_logprobs] == [
        (1, 0),
        (0, -torch.inf),
        (2, -torch.inf),
    ]
