"""What a request comes to: records for users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optgptq.errors import OptGPTQError


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One text of a request.

    Attributes:
        index: which of the request's `n` texts.
        token_ids: the new tokens, the one that ended the text included.
        text: what they spell; without end tokens, and cut before a stop string.
        finish_reason: `stop` (an end token or a stop string), `length`, `cancelled`, `timeout`, or `error`.
        stop_reason: the stop string or the token id of `stop_token_ids` that ended the text; None for the model's own
            end token and for other reasons.
        logprobs: for each new token the log probabilities (base e) of itself and of the likeliest tokens, by token id;
            None where they were not asked for.
    """

    index: int
    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: list[Mapping[int, float]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """All texts of a request.

    Attributes:
        request_id: of the request.
        prompt: the text it was given; None where it was given token ids.
        prompt_token_ids: what the model read.
        outputs: the texts, in order; empty where the request was refused.
        error: why the request was refused or failed; None where all went well.
        num_cached_tokens: tokens of the prompt that were not computed again.
        seconds_to_first_token: from the request's arrival; None without a token.
        seconds: from its arrival to its end.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: tuple[Completion, ...]
    error: OptGPTQError | None = None
    num_cached_tokens: int = 0
    seconds_to_first_token: float | None = None
    seconds: float = 0.0

    @property
    def token_ids(self) -> list[int]:
        """New tokens of the first text; none where the request was refused."""
        return self.outputs[0].token_ids if self.outputs else []

    @property
    def text(self) -> str:
        """The first text; empty where the request was refused."""
        return self.outputs[0].text if self.outputs else ""

    @property
    def finish_reason(self) -> str:
        """Why the first text ended; `error` where the request was refused."""
        return self.outputs[0].finish_reason if self.outputs else "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What a step adds to one text, for streaming.

    Attributes:
        request_id: of the request.
        index: which of its texts.
        token_ids: new tokens; empty where only held back text is given out.
        text: what can be shown now; never a part of a character, nor of what may still become a stop string.
        finish_reason: why the text ended with this piece; None while it goes on.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    finish_reason: str | None = None


def failure_result(request_id: str, prompt: str | Sequence[int], error: OptGPTQError) -> GenerationResult:
    """Return the result of a request that was refused."""
    is_text = isinstance(prompt, str | bytes | bytearray | memoryview)
    ids = prompt if isinstance(prompt, Sequence) and not is_text else ()
    return GenerationResult(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=[token for token in ids if isinstance(token, int)],
        outputs=(),
        error=error,
    )
