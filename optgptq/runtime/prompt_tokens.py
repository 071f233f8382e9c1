"""From what a user asks to token ids that the model has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from operator import index
from typing import SupportsIndex

from optgptq.data.tokenizer import Tokenizer
from optgptq.errors import UsageError

Prompt = str | Sequence[int]

_NO_LISTS = (bytes, bytearray, memoryview, Mapping, Set)


def prompt_token_ids(prompt: Prompt, tokenizer: Tokenizer | None, *, where: str, vocab_size: int) -> tuple[int, ...]:
    """Return the tokens of a prompt: those of text as `text_ids` begins it, token ids as they are.

    Args:
        prompt: text or token ids; whole numbers of any kind, a tensor of them too.
        tokenizer: of the model; None: there is none.
        where: whose prompt it is, for messages.
        vocab_size: token ids of the model run from 0 to one less.

    Raises:
        UsageError: neither text nor a list, text that there is no tokenizer for or that UTF-8 cannot hold, or token ids
            that the model does not have. Where nothing is left to begin with, that is not refused here.
    """
    ids = tuple(_encode(prompt, tokenizer, where) if isinstance(prompt, str) else _whole_numbers(prompt, where))
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UsageError(
            where,
            expected=f"token ids from 0 to {vocab_size - 1}",
            found=str(max(ids) if max(ids) >= vocab_size else min(ids)),
            action="Use the tokenizer that belongs to the model.",
        )
    return ids


def text_ids(text: str, tokenizer: Tokenizer, *, bos: bool | None = None) -> list[int]:
    """Return the tokens of a text; none for an empty one without BOS.

    Args:
        text: what UTF-8 can hold.
        tokenizer: of the model.
        bos: begin with the BOS token, if there is one; None: where the tokenizer has that habit, and where there is
            nothing else to begin with.
    """
    ids = tokenizer.encode(text)
    wanted = (tokenizer.adds_bos or not ids) if bos is None else bos
    return [tokenizer.bos_token_id, *ids] if wanted and tokenizer.bos_token_id is not None else ids


def is_token_id(value: object) -> bool:
    """True for a whole number of any kind; arrays and tensors of several dimensions are none, whatever they hold."""
    if not isinstance(value, SupportsIndex):
        return False
    try:
        iter(value)  # type: ignore[call-overload]
    except TypeError:
        return True
    return False


def is_list(value: object) -> bool:
    """True for lists, tuples, arrays and tensors. Not for a generator, which can be read only once.

    Numbers would come out of bytes and of the keys of a mapping too, but not those that anybody means.
    """
    return isinstance(value, Iterable) and isinstance(value, Sized) and not isinstance(value, _NO_LISTS)


def _encode(prompt: str, tokenizer: Tokenizer | None, where: str) -> Sequence[int]:
    if tokenizer is None:
        raise UsageError(where, expected="token ids", found="text, and no tokenizer", action="Give token ids.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            where,
            expected="text that UTF-8 can hold",
            found=f"{prompt[error.start]!r} at character {error.start}, one half of a pair",
            action="Correct how the text is read, or replace such characters.",
        ) from error
    return text_ids(prompt, tokenizer)


def _whole_numbers(prompt: Iterable[SupportsIndex], where: str) -> list[int]:
    if not is_list(prompt):
        raise UsageError(
            where,
            expected="text or a list of token ids",
            found=f"an object of type {type(prompt).__name__}",
            action="Give whole numbers, or one text.",
        )
    try:
        return [index(token) for token in prompt]
    except TypeError as error:
        raise UsageError(
            where, expected="text or a list of token ids", found=str(error), action="Give whole numbers, or one text."
        ) from error
