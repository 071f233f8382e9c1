"""Documents to token ids, several at a time, until enough has been read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch

from optgptq.data.tokenizer import Tokenizer

# Long enough to keep all cores busy, short enough to stop soon after the limit.
CHARACTERS_PER_BATCH = 1_000_000


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """Token ids of each document, in order.

    Attributes:
        documents: ids, BOS included where one was asked for; no document is empty.
        num_duplicates: documents whose text equals that of an earlier one.
        cut_short: reading stopped at the limit before the text ended.
    """

    documents: tuple[list[int], ...]
    num_duplicates: int
    cut_short: bool

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.documents))

    def joined(self) -> list[int]:
        """Return the ids of all documents as one list."""
        return list(chain.from_iterable(self.documents))


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document)
        if num_characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def read_tokens(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    bos_before_document: int | None = None,
    max_tokens: int | None = None,
    max_documents: int | None = None,
) -> TokenizedText:
    """Return the ids of `documents`; a text is only ever split between documents, so that no id changes.

    Reading stops after the document with which `max_tokens` or `max_documents` is reached. Where it stops depends on
    the documents alone, not on how many are tokenized at a time.
    """
    prefix = [] if bos_before_document is None else [bos_before_document]
    found: list[list[int]] = []
    seen: set[bytes] = set()
    num_tokens = num_read = 0
    for batch in _batches(documents):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            if _reached(num_tokens, max_tokens) or _reached(len(found), max_documents):
                return TokenizedText(tuple(found), num_read - len(seen), cut_short=True)
            if not ids:
                continue
            num_read += 1
            seen.add(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
            found.append(prefix + ids)
            num_tokens += len(found[-1])
    return TokenizedText(tuple(found), num_read - len(seen), cut_short=False)


def _reached(count: int, limit: int | None) -> bool:
    return limit is not None and count >= limit


def tokens_sha256(*tensors: torch.Tensor) -> str:
    """Return the SHA-256 of integer tensors, one after the other, as little-endian int64."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.to(torch.int64).cpu().contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()
