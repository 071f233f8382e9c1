"""Choosing tokens: greedy, temperature, top-k, top-p, and the randomness behind them."""

from __future__ import annotations

import pytest
import torch

from optgptq.errors import NumericalError, UsageError
from optgptq.runtime.sampling import SamplingSettings, choose_tokens, draw_uniforms

LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 3.5]])


def frequencies(settings: SamplingSettings, logits_V: torch.Tensor, *, draws: int = 4000) -> torch.Tensor:
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = choose_tokens(logits_V.expand(draws, -1), uniform, settings)
    return torch.bincount(tokens, minlength=len(logits_V)) / draws


def test_zero_temperature_takes_the_likeliest():
    assert choose_tokens(LOGITS, torch.zeros(2, dtype=torch.float64), SamplingSettings()).tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_evenly_spread_numbers_give_the_softmax(temperature):
    found = frequencies(SamplingSettings(temperature=temperature), LOGITS[0])
    torch.testing.assert_close(found, torch.softmax(LOGITS[0] / temperature, dim=-1), atol=1e-3, rtol=0)


def test_top_k_keeps_the_likeliest_in_proportion():
    found = frequencies(SamplingSettings(temperature=1.0, top_k=2), LOGITS[0])
    expected = torch.softmax(torch.tensor([-torch.inf, 2.0, 1.0, -torch.inf]), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_top_p_keeps_the_shortest_prefix_that_reaches_it():
    probabilities = torch.tensor([0.1, 0.5, 0.3, 0.1])
    found = frequencies(SamplingSettings(temperature=1.0, top_p=0.7), probabilities.log())
    torch.testing.assert_close(found, torch.tensor([0.0, 0.625, 0.375, 0.0]), atol=1e-3, rtol=0)
    only_first = frequencies(SamplingSettings(temperature=1.0, top_p=0.01), probabilities.log())
    assert only_first.tolist() == [0.0, 1.0, 0.0, 0.0]


def test_a_number_just_below_one_takes_a_token_that_has_probability():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert choose_tokens(logits, almost_one, SamplingSettings(temperature=1.0)).tolist() == [2]
    assert choose_tokens(logits, torch.zeros(1, dtype=torch.float64), SamplingSettings(temperature=1.0)).tolist() == [0]


def test_randomness_of_a_prompt_does_not_depend_on_the_others():
    settings = SamplingSettings(max_tokens=7, temperature=1.0, seed=5)
    together = draw_uniforms(settings, 0, 4)
    assert together.shape == (4, 7)
    assert together.dtype == torch.float64
    for index in range(4):
        assert torch.equal(draw_uniforms(settings, index, 1)[0], together[index])
    assert len({row[0].item() for row in together}) == 4


def test_the_global_generator_is_not_touched():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    draw_uniforms(SamplingSettings(), 0, 3)
    choose_tokens(LOGITS, torch.rand(2, dtype=torch.float64, generator=torch.Generator()), SamplingSettings())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_stop_the_run(temperature):
    logits = torch.tensor([[0.0, torch.nan]])
    with pytest.raises(NumericalError, match="expected numbers, found NaN"):
        choose_tokens(logits, torch.zeros(1, dtype=torch.float64), SamplingSettings(temperature=temperature))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_refused(values, name):
    with pytest.raises(UsageError) as caught:
        SamplingSettings(**values)
    assert caught.value.where == name
