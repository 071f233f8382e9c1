"""Text of tokens that come one after another, in time that grows with their number.

Only the last tokens are decoded again, after a few that give them context: some tokenizers leave out a space at the
beginning of what they decode. A character whose bytes are not all there decodes to U+FFFD, so text that ends with
U+FFFD waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so at most three that wait for the rest: each is one U+FFFD or less.
MAX_WAITING = 3
# Tokens without finished text after which the window is cut. Ordinary characters need four at most.
MAX_HELD_TOKENS = 16
NUM_CONTEXT_TOKENS = 8


class Decoder(Protocol):
    """What is needed of a tokenizer; `optgptq.data.tokenizer.Tokenizer` has it."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """Turns the tokens of one text into pieces that together are the text.

    The joined pieces equal `decode` of all tokens, with one exception: a tokenizer that spells unknown characters in
    bytes (SentencePiece's byte fallback) makes U+FFFD of a whole run of bytes when one of them is wrong, even of
    characters that were complete. Those have been handed out by then and stay.
    """

    __slots__ = (
        "_decoder",
        "_emitted",
        "_limit",
        "_num_context",
        "_prompt",
        "_skip_special_tokens",
        "_text",
        "_window",
    )

    def __init__(self, decoder: Decoder, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> None:
        """Begin a text.

        Args:
            decoder: the tokenizer.
            skip_special_tokens: leave special tokens out.
            prompt_ids: tokens before the text, whose own text is not handed out. A character that begins in them is
                handed out if the text completes it.
        """
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        # Context, then tokens whose text is not finished.
        self._window = list(prompt_ids[-NUM_CONTEXT_TOKENS:])
        self._num_context = len(self._window)
        self._text = self._prompt = self._decode(self._window) if self._window else ""
        self._emitted = 0  # characters of the window's text that were handed out
        self._limit = MAX_HELD_TOKENS

    def add(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens and return the text that they finish; it may be empty."""
        before, self._text = self._text, self._decode([*self._window, *token_ids])
        is_finished = not self._text.endswith(REPLACEMENT)
        if self._text == before and self._has_no_text(token_ids, is_finished=is_finished):
            return ""
        self._window.extend(token_ids)
        if is_finished:
            self._leave_prompt()
            piece = self._text[self._emitted :]
            if piece:
                self._keep(self._window[self._num_context :], waiting=0)
            return piece
        if len(self._window) - self._num_context > self._limit:
            return self._emit_most()
        return ""

    def finish(self) -> str:
        """Return the rest, unfinished characters included."""
        self._leave_prompt()
        text = self._text[self._emitted :]
        self._window, self._num_context, self._text, self._emitted = [], 0, "", 0
        return text

    def _leave_prompt(self) -> None:
        """See what of the window's text is the prompt's: as much as the text after it has not changed."""
        if self._prompt:
            self._emitted = _num_common(self._prompt, self._text)
            self._prompt = ""

    def _has_no_text(self, token_ids: Sequence[int], *, is_finished: bool) -> bool:
        """Whether tokens that left the text as it was, such as skipped special ones, need not be kept.

        Where there is no text at all yet, a few are kept: the first may be a space that is left out at the beginning
        only. Where a character waits, a further byte of it may look like nothing new.
        """
        if not self._text:
            return len(self._window) >= MAX_HELD_TOKENS
        return is_finished or not self._decode(token_ids)

    def _emit_most(self) -> str:
        """Hand out what no further token can change, though the text has not come to an end of a character for long."""
        self._leave_prompt()
        text = self._text
        end = max(self._emitted, len(text) - MAX_WAITING)
        recent = self._window[-NUM_CONTEXT_TOKENS:]
        recent_text = self._decode(recent)
        # The end of the text is read alike without what lies before, if more than one character's bytes are there.
        if len(recent_text) > MAX_WAITING and text[end:] == recent_text[len(recent_text) - (len(text) - end) :]:
            piece = text[self._emitted : end]
            self._keep(recent, waiting=len(text) - end)
            return piece
        self._limit *= 2
        return ""

    def _keep(self, tokens: list[int], *, waiting: int) -> None:
        """Go on with `tokens` as context; the last `waiting` characters of their text are not handed out yet."""
        self._window = tokens
        self._num_context = len(tokens)
        self._text = self._decode(tokens)
        self._emitted = len(self._text) - waiting
        self._limit = MAX_HELD_TOKENS

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _num_common(first: str, second: str) -> int:
    """Return with how many equal characters two texts begin."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
