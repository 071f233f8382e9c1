"""Changes to logits: each by itself, their order, and users' processors that go wrong."""

from __future__ import annotations

import pytest
import torch
from support.slow_sampling import row_of, slow_adjusted

from optgptq.errors import UsageError
from optgptq.runtime.logits_processors import adjust_logits
from optgptq.runtime.sampler import SampledToken, sample
from optgptq.scheduling.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
LOGITS = [1.0, -1.0, 2.0, 0.5, -2.0]


def adjusted(params: SamplingParams, **where) -> list[float]:
    logits = torch.tensor([LOGITS])
    assert adjust_logits(logits, [row_of(params, **where)]) == {}
    return logits[0].tolist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, LOGITS),
        ({"logit_bias": {0: 1.5, 4: -1.0}}, [2.5, -1.0, 2.0, 0.5, -3.0]),
        # Prompt [0, 1], new text [1, 1, 2]: positive logits are divided, negative ones multiplied.
        ({"repetition_penalty": 2.0}, [0.5, -2.0, 1.0, 0.5, -2.0]),
        ({"repetition_penalty": 0.5}, [2.0, -0.5, 4.0, 0.5, -2.0]),
        ({"presence_penalty": 0.5}, [1.0, -1.5, 1.5, 0.5, -2.0]),
        ({"frequency_penalty": 0.5}, [1.0, -2.0, 1.5, 0.5, -2.0]),
        ({"repetition_penalty": 2.0, "frequency_penalty": 1.0, "presence_penalty": 1.0}, [0.5, -5.0, -1.0, 0.5, -2.0]),
        # A bias is penalized with the logit that it made.
        ({"logit_bias": {2: 2.0}, "repetition_penalty": 2.0}, [0.5, -2.0, 2.0, 0.5, -2.0]),
    ],
)
def test_what_each_parameter_does(values, expected):
    assert adjusted(SamplingParams(**values), prompt=(0, 1), output=[1, 1, 2]) == expected


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_ends_are_impossible_until_enough_is_written(ignore_eos):
    params = SamplingParams(min_tokens=2, stop_token_ids=[1], logit_bias={3: 50.0}, ignore_eos=ignore_eos)
    # 99 is an end-of-text token that the model has no logit for.
    held_back = [1.0, -torch.inf, 2.0, -torch.inf, -2.0]
    assert adjusted(params, output=[0], eos=[3, 99]) == held_back
    assert adjusted(params, output=[0, 0], eos=[3, 99]) == [1.0, -1.0, 2.0, 50.5, -2.0]


def test_rows_with_different_parameters_together():
    rows = [
        row_of(SamplingParams(frequency_penalty=0.5, logit_bias={1: 3.0}), prompt=[4], output=[1, 1]),
        row_of(SamplingParams(min_tokens=5), eos=[0]),
        row_of(SamplingParams()),
        row_of(SamplingParams(repetition_penalty=1.3, min_tokens=9), prompt=[0, 0, 3], output=[3], eos=[2]),
    ]
    logits = torch.tensor([LOGITS] * 4)
    adjust_logits(logits, rows)
    expected = torch.tensor([slow_adjusted(LOGITS, row) for row in rows])
    torch.testing.assert_close(logits, expected)


def test_processors_run_first_and_in_turn():
    seen = []

    def double(prompt_ids, output_ids, logits_V):
        seen.append((tuple(prompt_ids), list(output_ids), logits_V.tolist()))
        return logits_V * 2

    def add_one(prompt_ids, output_ids, logits_V):
        logits_V += 1
        return logits_V

    params = SamplingParams(logits_processors=[double, add_one], logit_bias={0: 10.0}, min_tokens=1)
    assert adjusted(params, prompt=(7,), eos=[2]) == [13.0, -1.0, -torch.inf, 2.0, -3.0]
    assert seen == [((7,), [], LOGITS)]


def test_a_processor_decides_a_greedy_token_and_may_use_another_dtype():
    def only_fourth(prompt_ids, output_ids, logits_V):
        allowed = torch.full_like(logits_V, -torch.inf, dtype=torch.float64)
        allowed[3] = 0.0
        return allowed

    params = SamplingParams(temperature=0.0, logits_processors=[only_fourth], logprobs=0)
    token = sample(torch.tensor([LOGITS]), [row_of(params)])[0]
    assert token.token_id == 3
    assert token.logprob == torch.log_softmax(torch.tensor(LOGITS), dim=-1)[3].item()


def explode(prompt_ids, output_ids, logits_V):
    raise KeyError("no grammar")


class WrongShape:
    def __call__(self, prompt_ids, output_ids, logits_V):
        return logits_V[:-1]


def wrong_type(prompt_ids, output_ids, logits_V):
    return logits_V.tolist()


def wrong_dtype(prompt_ids, output_ids, logits_V):
    return logits_V.long()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("processor", "where", "expected", "found"),
    [
        (explode, "logits processor explode", "changed logits", "KeyError: 'no grammar'"),
        (WrongShape(), "logits processor WrongShape", "float logits of shape [5]", "torch.float32 of shape [4]"),
        (wrong_type, "logits processor wrong_type", "a tensor of logits", "list"),
        (wrong_dtype, "logits processor wrong_dtype", "float logits of shape [5]", "torch.int64 of shape [5]"),
    ],
)
def test_a_processor_that_goes_wrong_fails_its_row_only(temperature, processor, where, expected, found):
    params = SamplingParams(temperature=temperature, logits_processors=[processor])
    tokens = sample(torch.tensor([LOGITS] * 3), [row_of(GREEDY), row_of(params), row_of(GREEDY)])
    assert tokens[0] == tokens[2] == SampledToken(token_id=2)
    error = tokens[1].error
    assert isinstance(error, UsageError)
    assert (error.where, error.expected, error.found) == (where, expected, found)
    assert error.action == "Correct this processor, or leave it out of logits_processors."


def test_a_processor_that_makes_nan_fails_its_row_only():
    params = SamplingParams(logits_processors=[lambda prompt_ids, output_ids, logits_V: logits_V * torch.nan])
    tokens = sample(torch.tensor([LOGITS] * 2), [row_of(params), row_of(GREEDY)])
    assert tokens[1] == SampledToken(token_id=2)
    assert tokens[0].error is not None
    assert tokens[0].error.where == "logits after the sampling parameters"


def test_an_interruption_is_not_taken_for_a_processor_that_failed():
    def interrupted(prompt_ids, output_ids, logits_V):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(torch.tensor([LOGITS]), [row_of(SamplingParams(logits_processors=[interrupted]))])
