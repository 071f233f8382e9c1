from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.texts import write_tokenizer

from optgptq.bundled import bundled_path
from optgptq.data.corpora import TextSource, load_documents
from optgptq.data.evaluation import evaluation_windows
from optgptq.data.tokenizer import Tokenizer, load_tokenizer
from optgptq.errors import TextError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_bos=True))


def test_windows_are_consecutive_in_order_and_hold_no_bos(tokenizer: Tokenizer) -> None:
    windows = evaluation_windows(["abcde", "fghijk"], tokenizer, window_size=3)
    assert [tokenizer.decode(row) for row in windows.tokens_WS.tolist()] == ["abc", "def", "ghi"]
    assert windows.first_scored_W.tolist() == [1, 1, 1]
    assert (windows.num_scored_tokens, windows.num_tokens_available, windows.remainder_tokens) == (6, 11, 2)
    assert windows.notes == ("3 windows of 3 tokens, one every 3 tokens; 2 tokens at the end fill no window.",)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_with_a_stride_every_token_after_the_first_is_scored_once(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = "".join(chr(33 + index % 90) for index in range(data.draw(st.integers(2, 60))))
    window_size = data.draw(st.integers(2, len(text)))
    stride = data.draw(st.integers(1, window_size))
    max_tokens = data.draw(st.none() | st.integers(window_size, 70))
    windows = evaluation_windows([text], tokenizer, window_size=window_size, stride=stride, max_tokens=max_tokens)
    kept = len(text) if max_tokens is None else min(len(text), max_tokens)
    assert windows.num_tokens_available == kept
    assert windows.remainder_tokens == (kept - window_size) % stride
    scored = []
    for index, (row, first) in enumerate(zip(windows.tokens_WS.tolist(), windows.first_scored_W.tolist(), strict=True)):
        start = index * stride
        assert tokenizer.decode(row) == text[start : start + window_size]
        scored += range(start + first, start + window_size)
    if stride < window_size:
        assert scored == list(range(1, kept - windows.remainder_tokens))
    assert len(scored) == windows.num_scored_tokens


def test_max_tokens_of_the_bundled_text() -> None:
    bundled = load_tokenizer(bundled_path("story-llama"))
    documents = load_documents(TextSource(source="bundled:story-evaluation"))
    windows = evaluation_windows(documents, bundled, window_size=512, max_tokens=20_000)
    assert tuple(windows.tokens_WS.shape) == (39, 512)
    assert (windows.num_scored_tokens, windows.remainder_tokens) == (39 * 511, 32)


@pytest.mark.parametrize(
    ("settings_", "where", "expected"),
    [
        ({"window_size": 1}, "--window-size", "at least 2, since the first token of a window is not scored"),
        ({"window_size": 4, "stride": 0}, "--stride", "a number from 1 to the window size, 4"),
        ({"window_size": 4, "stride": 5}, "--stride", "a number from 1 to the window size, 4"),
        ({"window_size": 4, "max_tokens": 3}, "--max-tokens", "at least one window, 4 tokens"),
    ],
)
def test_numbers_that_cannot_be_obeyed(
    tokenizer: Tokenizer, settings_: dict[str, Any], where: str, expected: str
) -> None:
    with pytest.raises(UsageError) as caught:
        evaluation_windows(["abcdefgh"], tokenizer, **settings_)
    assert (caught.value.where, caught.value.expected) == (where, expected)


@pytest.mark.parametrize("text", ["", "abc"])
def test_text_shorter_than_a_window(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(TextError) as caught:
        evaluation_windows([text], tokenizer, window_size=4)
    assert caught.value.expected == "at least 4 tokens, one window"
    assert caught.value.found == f"{len(text)} tokens"
