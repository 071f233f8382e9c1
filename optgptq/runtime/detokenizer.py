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

    __slots__ = ("_decoder", "_emitted", "_limit", "_num_context", "_skip_special_tokens", "_window")

    def __init__(self, decoder: Decoder, *, skip_special_tokens: bool = True) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []  # context, then tokens whose text is not finished
        self._num_context = 0
        self._emitted = 0  # characters of the window's text that were handed out
        self._limit = MAX_HELD_TOKENS

    def add(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens and return the text that they finish; it may be empty."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            return self._emit_all(text, len(token_ids))
        if len(self._window) - self._num_context > self._limit:
            return self._emit_most(text)
        return ""

    def finish(self) -> str:
        """Return the rest, unfinished characters included."""
        text = self._decode(self._window)[self._emitted :]
        self._window, self._num_context, self._emitted = [], 0, 0
        return text

    def _emit_all(self, text: str, num_new: int) -> str:
        piece = text[self._emitted :]
        if piece:
            self._keep(self._window[self._num_context :], waiting=0)
        elif text or len(self._window) > self._limit:
            # Tokens without text, such as skipped special ones, would only make the window longer. Without any text
            # before them they are kept: the first may be a space that is left out at the beginning only.
            del self._window[len(self._window) - num_new :]
        return piece

    def _emit_most(self, text: str) -> str:
        """Hand out what no further token can change, though the text has not come to an end of a character for long."""
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
        self._emitted = len(self._decode(tokens)) - waiting
        self._limit = MAX_HELD_TOKENS

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
