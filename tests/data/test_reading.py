from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.texts import write_tokenizer

from optgptq.data import reading
from optgptq.data.reading import read_tokens, tokens_sha256
from optgptq.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_documents_are_kept_apart_and_join_in_order(tokenizer: Tokenizer) -> None:
    text = read_tokens(["ab", "", "c"], tokenizer)
    assert text.documents == (tokenizer.encode("ab"), tokenizer.encode("c"))
    assert text.joined() == tokenizer.encode("abc")
    assert (text.num_tokens, text.num_duplicates, text.cut_short) == (3, 0, False)


def test_a_bos_before_each_document_counts(tokenizer: Tokenizer) -> None:
    text = read_tokens(["ab", "", "c"], tokenizer, bos_before_document=0)
    assert text.joined() == [0, *tokenizer.encode("ab"), 0, *tokenizer.encode("c")]
    assert text.num_tokens == 5


def test_duplicates_are_counted(tokenizer: Tokenizer) -> None:
    assert read_tokens(["a", "b", "a", "a"], tokenizer).num_duplicates == 2


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=8),
    max_tokens=st.integers(1, 20),
    characters_per_batch=st.integers(1, 30),
)
def test_reading_stops_after_the_document_that_reaches_the_limit(
    tokenizer: Tokenizer, lengths: list[int], max_tokens: int, characters_per_batch: int
) -> None:
    """Slow reference: one document at a time. The size of a batch must not matter."""
    documents = ["x" * length for length in lengths]
    expected: list[int] = []
    for length in lengths:
        if sum(expected) < max_tokens and length:
            expected.append(length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHARACTERS_PER_BATCH", characters_per_batch)
        text = read_tokens(documents, tokenizer, max_tokens=max_tokens)
    assert [len(ids) for ids in text.documents] == expected


def test_a_limit_on_documents(tokenizer: Tokenizer) -> None:
    text = read_tokens(["a", "", "b", "c"], tokenizer, max_documents=2)
    assert text.joined() == tokenizer.encode("ab")
    assert text.cut_short
    assert not read_tokens(["a", "b"], tokenizer, max_documents=2).cut_short


def test_reading_does_not_run_through_an_endless_source(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHARACTERS_PER_BATCH", 10)
    endless = iter(lambda: "abcde", None)
    assert read_tokens(endless, tokenizer, max_tokens=12).num_tokens == 15


def test_the_hash_is_over_little_endian_int64(tmp_path: Path) -> None:
    expected = hashlib.sha256(struct.pack("<5q", 1, 2, 3, 4, 5)).hexdigest()
    assert tokens_sha256(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), torch.tensor([5])) == expected
    transposed = torch.tensor([[1, 3], [2, 4]]).T
    assert tokens_sha256(transposed, torch.tensor([5])) == expected
