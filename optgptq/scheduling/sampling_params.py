"""How the texts of one request are written: vLLM's names and defaults, checked when the record is built.

docs/sampling.md says what each parameter does, and in which order they are applied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

from optgptq.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PENALTY = 2.0
MAX_SEED = (1 << 63) - 1
Check = Callable[[str, object], None]


class LogitsProcessor(Protocol):
    """A user's own change to the logits of the next token."""

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits_V: Tensor, /) -> Tensor:
        """Return float logits `[V]` to use instead; `logits_V` (float32) may be changed and returned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the texts of one request are written.

    Attributes:
        n: texts to write for the prompt.
        presence_penalty: taken off the logits of tokens that the new text holds; -2 to 2.
        frequency_penalty: taken off the logits as often as the new text holds the token; -2 to 2.
        repetition_penalty: divides positive logits, multiplies negative ones, of tokens in prompt or new text.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample among the fewest tokens that hold this share of probability together.
        top_k: sample among this many likeliest tokens; 0 or -1 for all.
        min_p: sample among tokens at least this share as likely as the likeliest.
        seed: makes the texts repeatable; None draws one for the request.
        stop: strings that end a text; a tuple once built, see `stop_strings`.
        stop_token_ids: tokens that end a text; a tuple once built, see `stop_ids`.
        ignore_eos: write on after the model's end-of-text tokens.
        max_tokens: new tokens per text at most; None for as many as the model has positions.
        min_tokens: new tokens before anything but `max_tokens` may end a text.
        logprobs: this many likeliest tokens are reported with each new token; None reports nothing.
        logit_bias: added to the logits of these token ids.
        detokenize: turn token ids into text.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string that ended the text.
        logits_processors: own changes to the logits, in this order; a tuple once built, see `processors`.

    Raises:
        UsageError: a value of the wrong type or out of range; `where` is the field.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logits_processors: Sequence[LogitsProcessor] | None = None

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            check(name, getattr(self, name))
        normal: dict[str, object] = {
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "logits_processors": tuple(self.logits_processors or ()),
            "logit_bias": None if self.logit_bias is None else dict(self.logit_bias),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)
        if self.stop and not self.detokenize:
            _refuse("stop", "no stop strings where detokenize is False", self.stop)

    @property
    def is_greedy(self) -> bool:
        """The likeliest token is taken; nothing is drawn."""
        return self.temperature == 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as the tuple that it is once built."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`stop_token_ids` as the tuple that it is once built."""
        assert isinstance(self.stop_token_ids, tuple)
        return self.stop_token_ids

    @property
    def processors(self) -> tuple[LogitsProcessor, ...]:
        """`logits_processors` as the tuple that it is once built."""
        assert isinstance(self.logits_processors, tuple)
        return self.logits_processors

    def check_against(self, vocab_size: int) -> None:
        """Check what only the vocabulary tells.

        Args:
            vocab_size: token ids of the model run from 0 to one less.

        Raises:
            UsageError: a token id that the model does not have, or more logprobs than tokens.
        """
        for name, ids in (("stop_token_ids", self.stop_ids), ("logit_bias", tuple(self.logit_bias or ()))):
            unknown = [token_id for token_id in ids if token_id >= vocab_size]
            if unknown:
                _refuse(name, f"token ids below the vocabulary size {vocab_size}", unknown[0])
        if self.logprobs is not None and self.logprobs > vocab_size:
            _refuse("logprobs", f"at most the vocabulary size {vocab_size}", self.logprobs)


def _refuse(name: str, expected: str, found: object) -> NoReturn:
    raise UsageError(
        name, expected=expected, found=repr(found), action="Change this sampling parameter, or leave it out."
    )


def _is_int(value: object) -> bool:
    # True is an int for Python; as a count it is a mistake.
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN, infinities and integers that no float holds


def _rule(expected: str, holds: Callable[[object], bool]) -> Check:
    def check(name: str, value: object) -> None:
        if not holds(value):
            _refuse(name, expected, value)

    return check


def _integer(expected: str, low: int, high: int | None = None, *, optional: bool = False) -> Check:
    def holds(value: object) -> bool:
        if value is None:
            return optional
        return isinstance(value, int) and _is_int(value) and low <= value and (high is None or value <= high)

    return _rule(("None or " if optional else "") + expected, holds)


def _number(expected: str, in_range: Callable[[float], bool]) -> Check:
    return _rule(expected, lambda value: isinstance(value, int | float) and _is_number(value) and in_range(value))


def _sequence_of(expected: str, fits: Callable[[object], bool], *, or_text: bool = False) -> Check:
    def holds(value: object) -> bool:
        if value is None:
            return True
        if isinstance(value, str):
            return or_text and fits(value)
        return isinstance(value, Sequence) and not isinstance(value, bytes) and all(fits(item) for item in value)

    return _rule(expected, holds)


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and _is_int(value) and value >= 0


def _is_bias(value: object) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return all(_is_token_id(token_id) and _is_number(bias) for token_id, bias in value.items())


_PENALTY = _number("a number from -2 to 2", lambda value: abs(value) <= MAX_PENALTY)
_FLAG = _rule("True or False", lambda value: isinstance(value, bool))

CHECKS: Mapping[str, Check] = {
    "n": _integer("a whole number, at least 1", 1),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": _number("a finite number above 0", lambda value: value > 0),
    "temperature": _number("a finite number, 0 or more", lambda value: value >= 0),
    "top_p": _number("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "top_k": _integer("0 or -1 for all tokens, or a number of tokens", -1),
    "min_p": _number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "seed": _integer("a whole number from 0 to 2**63 - 1", 0, MAX_SEED, optional=True),
    "stop": _sequence_of(
        "a string or a list of strings, none of them empty",
        lambda value: isinstance(value, str) and value != "",
        or_text=True,
    ),
    "stop_token_ids": _sequence_of("a list of token ids, each 0 or more", _is_token_id),
    "ignore_eos": _FLAG,
    "max_tokens": _integer("a whole number, at least 1", 1, optional=True),
    "min_tokens": _integer("a whole number, 0 or more", 0),
    "logprobs": _integer("a whole number, 0 or more", 0, optional=True),
    "logit_bias": _rule("None or a mapping from token ids, 0 or more, to finite numbers", _is_bias),
    "detokenize": _FLAG,
    "skip_special_tokens": _FLAG,
    "include_stop_str_in_output": _FLAG,
    "logits_processors": _sequence_of("None or a list of callables", callable),
}
