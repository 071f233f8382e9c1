"""Prompts as users give them, text, token ids or chat messages, through an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optgptq.data.tokenizer import Tokenizer
from optgptq.errors import OptGPTQError, TextError
from optgptq.runtime.engine import Engine
from optgptq.runtime.llm import generate
from optgptq.runtime.prompt_tokens import text_ids
from optgptq.runtime.results import GenerationResult, Piece
from optgptq.scheduling.sampling_params import SamplingParams

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """One prompt and how it is to be continued.

    Attributes:
        where: its place, for messages to people.
        params: how its texts are written.
        text: as it was given; None where it was not given as text.
        token_ids: taken as they are; None where it was not given so.
        messages: for the chat template; where these are given they are the prompt, and `text` is one of them.
        name: what its user calls it; None for nothing.
    """

    where: str
    params: SamplingParams
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: Messages | None = None
    name: str | int | None = None

    def as_chat(self, system: str | None) -> PromptRequest:
        """Return the request with its text as the message of a user, after one of the system where that is given."""
        if self.text is None or self.messages is not None:
            return self
        before = [] if system is None else [{"role": "system", "content": system}]
        return replace(self, messages=[*before, {"role": "user", "content": self.text}])


def require_unicode(text: str, where: str) -> None:
    """Check that a text can be encoded: JSON and command lines can hold halves of surrogate pairs.

    Raises:
        TextError: it holds one.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise TextError(
            where,
            expected="text that UTF-8 can hold",
            found="half of a surrogate pair",
            action="Write the text in UTF-8, without this character.",
        )


def prompt_ids(request: PromptRequest, tokenizer: Tokenizer | None, *, bos: bool | None) -> list[int]:
    """Return what the model reads.

    Args:
        request: the prompt.
        tokenizer: of the model; None: it has none.
        bos: begin text with the BOS token; None: where the tokenizer has that habit, and where there is nothing else.
            A chat template writes special tokens itself: only True adds one there. Token ids are taken as they are.

    Raises:
        TextError: nothing to begin with, no tokenizer for text, no chat template for messages or one that refuses them.
    """
    if request.token_ids is not None:
        return list(request.token_ids)
    if tokenizer is None:
        raise TextError(
            request.where, expected="token ids: the model has no tokenizer", found="text", action="Give token ids."
        )
    if request.messages is not None:
        ids = text_ids(tokenizer.render_chat(request.messages, add_generation_prompt=True), tokenizer, bos=bool(bos))
    else:
        ids = text_ids(request.text or "", tokenizer, bos=bos)
    if not ids:
        raise TextError(
            request.where,
            expected="at least one token to start from",
            found="an empty prompt, and no BOS token to begin with",
            action="Give a prompt.",
        )
    return ids


def run_requests(
    engine: Engine,
    requests: Sequence[PromptRequest],
    *,
    bos: bool | None = None,
    on_result: Callable[[int, GenerationResult], None] | None = None,
    on_piece: Callable[[int, Piece], None] | None = None,
) -> list[GenerationResult]:
    """Continue all prompts and return their results in order; one that cannot be served has `error`.

    Args:
        engine: it must have nothing else to do.
        requests: the prompts.
        bos: see `prompt_ids`.
        on_result: called with the number of a request, from 0, and its result, as soon as it is there.
        on_piece: called with the number of a request and what was added to its text, after each step.
    """
    results: dict[int, GenerationResult] = {}
    places: list[int] = []
    encoded: list[list[int]] = []

    def take(index: int, result: GenerationResult) -> None:
        results[index] = _placed(result, requests[index].where)
        if on_result is not None:
            on_result(index, results[index])

    for index, request in enumerate(requests):
        try:
            encoded.append(prompt_ids(request, engine.tokenizer, bos=bos))
            places.append(index)
        except OptGPTQError as error:
            take(index, _refused(request, error))
    generate(
        engine,
        encoded,
        [requests[index].params for index in places],
        on_result=lambda place, result: take(places[place], result),
        on_piece=None if on_piece is None else lambda place, piece: on_piece(places[place], piece),
    )
    return [results[index] for index in range(len(requests))]


def _refused(request: PromptRequest, error: OptGPTQError) -> GenerationResult:
    return GenerationResult(request_id=request.where, prompt=request.text, prompt_token_ids=[], outputs=(), error=error)


def _placed(result: GenerationResult, where: str) -> GenerationResult:
    """Return the result with the user's own name of its place in the error, where the engine says `request 7`."""
    error = result.error
    if error is None or error.where.startswith(where):
        return result
    place = where if error.where.startswith("request ") else f"{where}, {error.where}"
    placed = type(error)(place, expected=error.expected, found=error.found, action=error.action)
    placed.__cause__ = error
    return replace(result, error=placed)
