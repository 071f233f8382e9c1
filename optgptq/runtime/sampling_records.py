"""What the sampler is asked, and what it answers. Shapes: `V` vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optgptq.errors import OptGPTQError
from optgptq.scheduling.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SamplingRow:
    """What one row of logits is sampled with; the token ids are read, never kept.

    Attributes:
        params: checked against the vocabulary (`SamplingParams.check_against`).
        prompt_ids: token ids of the prompt.
        token_ids: of the whole text, the prompt first; the scheduler's own list.
        seed: of the request, 0 or more.
        fork: which of the request's `n` texts this is.
        eos_token_ids: end-of-text tokens of the model.
    """

    params: SamplingParams
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    seed: int
    fork: int
    eos_token_ids: tuple[int, ...]

    @property
    def output_ids(self) -> Sequence[int]:
        """The tokens written so far, a copy."""
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def num_written(self) -> int:
        """How many there are, the number of the new token."""
        return len(self.token_ids) - len(self.prompt_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """How likely the model found a token.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability, before any sampling parameter.
        rank: 1 for the likeliest token; of equally likely tokens the lower id comes first.
    """

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """The next token of a text, or why there is none.

    Attributes:
        token_id: the token; 0, which means nothing, where there is an error.
        logprob: as in `TokenLogprob`; None where `logprobs` is None.
        top_logprobs: the `logprobs` likeliest tokens by rank, then the chosen one if it is not among them.
        error: why no token could be chosen for this row; other rows are not touched by it. None: one was chosen.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    error: OptGPTQError | None = None
