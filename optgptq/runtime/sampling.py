"""From logits to the next token: greedy, or sampled with temperature, top-k and top-p.

Shapes: `B` sequences, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.errors import NumericalError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How tokens are chosen.

    Attributes:
        max_tokens: new tokens per prompt at most.
        temperature: 0 takes the likeliest token; 1 samples from the model's own distribution.
        top_k: sample among the `k` likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens that hold this share of probability together; 1 for all.
        seed: prompt `i` draws from a generator seeded with `seed + i`, so its text does not depend on the others.
        eos_token_ids: tokens that end a text; they are part of the result.
        ignore_eos: write `max_tokens` tokens whatever they are.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _require(0 <= self.temperature < float("inf"), "temperature", "a finite number, 0 or more", self.temperature)
        _require(self.top_k >= 0, "top_k", "0 for all tokens, or a number of tokens", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "more than 0 and at most 1", self.top_p)
        _require(0 <= self.seed < 1 << 62, "seed", "an integer from 0 to 2**62", self.seed)


def _require(holds: bool, name: str, expected: str, found: float) -> None:
    if not holds:
        raise UsageError(
            name, expected=expected, found=str(found), action="Change this sampling setting, or leave it out."
        )


def draw_uniforms(settings: SamplingSettings, first: int, count: int) -> torch.Tensor:
    """Return float64 numbers in `[0, 1)`, `[count, max_tokens]`: all the randomness of prompts `first ..`.

    The global generator of torch is not touched.
    """
    rows = []
    for index in range(first, first + count):
        generator = torch.Generator().manual_seed(settings.seed + index)
        rows.append(torch.rand(settings.max_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def choose_tokens(logits_BV: torch.Tensor, uniform_B: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Return the next token of every sequence, int64 `[B]`.

    Args:
        logits_BV: float logits.
        uniform_B: float64 in `[0, 1)`, one per sequence; not used at temperature 0.
        settings: how to choose.

    Raises:
        NumericalError: logits that are not numbers.
    """
    if bool(torch.isnan(logits_BV).any()):
        raise NumericalError(
            "logits",
            expected="numbers",
            found="NaN",
            action="Check the checkpoint with `optgptq verify`.",
        )
    if settings.temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BV = logits_BV.float() / settings.temperature
    if settings.top_k == 0 and settings.top_p == 1:
        return _invert(torch.softmax(scaled_BV, dim=-1), uniform_B)
    count = min(settings.top_k or scaled_BV.shape[-1], scaled_BV.shape[-1])
    # Sorted from the likeliest down, so that top-k is a prefix and top-p the shortest prefix that reaches it.
    top_BC, token_BC = scaled_BV.topk(count, dim=-1)
    probability_BC = torch.softmax(top_BC, dim=-1)
    if settings.top_p < 1:
        before_BC = probability_BC.cumsum(-1) - probability_BC
        probability_BC = probability_BC.masked_fill(before_BC >= settings.top_p, 0.0)
    choice_B = _invert(probability_BC, uniform_B)
    return token_BC.gather(1, choice_B[:, None]).squeeze(1)


def _invert(probability_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Return for each row the first index whose cumulative probability exceeds its uniform number."""
    cumulative_BV = probability_BV.double().cumsum(-1)
    threshold_B1 = (uniform_B.to(cumulative_BV.device) * cumulative_BV[:, -1])[:, None]
    choice_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1)
    # Rounding may put the threshold on the total itself: the last token with any probability is meant then.
    last_B = torch.searchsorted(cumulative_BV, cumulative_BV[:, -1:].contiguous(), right=False).squeeze(1)
    return torch.minimum(choice_B, last_B)
