from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.texts import write_tokenizer

from optgptq.bundled import bundled_path
from optgptq.data.corpora import TextSource, load_documents
from optgptq.data.reading import tokens_sha256
from optgptq.data.tokenizer import Tokenizer, load_tokenizer
from optgptq.data.windows import WindowSettings, build_windows, resolve_window_size, windows_from_tokens
from optgptq.errors import RecipeError, TextError
from optgptq.recipe import CalibrationRecipe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def tokenizer_without_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), config={"bos_token": None}))


@pytest.mark.parametrize(
    ("recipe_value", "max_position", "expected"),
    [(None, None, 2048), (None, 1024, 1024), (None, 4096, 2048), (512, 1024, 512), (512, 256, 512)],
)
def test_window_size(recipe_value: int | None, max_position: int | None, expected: int) -> None:
    assert resolve_window_size(recipe_value, max_position) == expected


def test_settings_come_from_a_recipe() -> None:
    recipe = CalibrationRecipe(source="a.txt", num_windows=3, seed=5, bos="window", layout="documents")
    assert WindowSettings.of(recipe, window_size=7) == WindowSettings(
        window_size=7, num_windows=3, seed=5, bos="window", layout="documents"
    )


def test_packed_windows_are_consecutive_and_the_remainder_is_stated(tokenizer: Tokenizer) -> None:
    windows = build_windows(["abcde", "fghij", "k"], tokenizer, WindowSettings(window_size=3, num_windows=9))
    rows = {tokenizer.decode(row) for row in windows.tokens_WS.tolist()}
    assert rows == {"abc", "def", "ghi"}
    assert (windows.num_windows, windows.window_size, windows.num_windows_requested) == (3, 3, 9)
    assert (windows.num_tokens_available, windows.remainder_tokens, windows.num_tokens) == (11, 2, 9)
    assert windows.lengths_W.tolist() == [3, 3, 3]
    assert windows.tokens_WS.dtype == windows.lengths_W.dtype == torch.int64
    assert windows.notes == ("3 of 3 windows of 3 tokens, chosen with seed 0; 2 tokens at the end fill no window.",)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.text("abcdefgh", max_size=30), min_size=1, max_size=6),
    window_size=st.integers(2, 9),
    num_windows=st.integers(1, 12),
    seed=st.integers(0, 3),
    bos=st.sampled_from(["none", "window", "document"]),
)
def test_packed_windows_against_a_literal_reference(
    tokenizer: Tokenizer, documents: list[str], window_size: int, num_windows: int, seed: int, bos: str
) -> None:
    stream: list[int] = []
    for document in documents:
        if len(stream) < 4 * num_windows * window_size and document:
            stream += ([0] if bos == "document" else []) + tokenizer.encode(document)
    size = window_size - 1 if bos == "window" else window_size
    pieces = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
    expected = [([0] if bos == "window" else []) + piece for piece in pieces]
    window_settings = WindowSettings(window_size=window_size, num_windows=num_windows, seed=seed, bos=bos)
    if not expected:
        with pytest.raises(TextError):
            build_windows(documents, tokenizer, window_settings)
        return
    windows = build_windows(documents, tokenizer, window_settings)
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(seed))[:num_windows].tolist()
    assert windows.tokens_WS.tolist() == [expected[index] for index in order]
    assert windows.remainder_tokens == len(stream) - size * len(expected)
    assert windows.num_tokens_available == len(stream)


def test_the_same_seed_gives_the_same_windows_and_the_global_generator_is_not_touched(tokenizer: Tokenizer) -> None:
    documents = ["abcdefghijklmnopqrstuvwxyz" * 20]
    before = torch.get_rng_state()
    first, again, other = [
        build_windows(documents, tokenizer, WindowSettings(window_size=7, num_windows=5, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.tokens_WS, again.tokens_WS)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.sha256 == tokens_sha256(first.tokens_WS, first.lengths_W)


def test_documents_fill_one_window_each_cut_or_padded(tokenizer: Tokenizer) -> None:
    settings_ = WindowSettings(window_size=4, num_windows=5, layout="documents", bos="document")
    windows = build_windows(["abcdefgh", "x", "", "yz!"], tokenizer, settings_)
    rows = {
        (tuple(row[:length]), tuple(row[length:]))
        for row, length in zip(windows.tokens_WS.tolist(), windows.lengths_W.tolist(), strict=True)
    }
    assert rows == {
        ((0, *tokenizer.encode("abc")), ()),
        ((0, *tokenizer.encode("x")), (0, 0)),
        ((0, *tokenizer.encode("yz!")), ()),
    }
    assert (windows.num_tokens, windows.remainder_tokens, windows.num_tokens_available) == (10, 5, 15)
    assert windows.notes == (
        "3 of 3 documents, chosen with seed 0, one per window of 4 tokens; 5 tokens of longer documents are cut off.",
    )


def test_window_and_document_bos_are_the_same_where_documents_are_windows(tokenizer: Tokenizer) -> None:
    by_window, by_document = (
        build_windows(["abc", "d"], tokenizer, WindowSettings(window_size=3, layout="documents", bos=bos))
        for bos in ("window", "document")
    )
    assert torch.equal(by_window.tokens_WS, by_document.tokens_WS)


def test_reading_stops_at_four_times_what_is_needed_and_says_so(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optgptq.data.reading.CHARACTERS_PER_BATCH", 10)
    endless = iter(lambda: "abcde", None)
    windows = build_windows(endless, tokenizer, WindowSettings(window_size=5, num_windows=2))
    assert windows.num_tokens_available == 40
    assert windows.num_duplicate_documents == 7
    assert windows.notes[1] == (
        "Reading stopped after 8 documents with 40 tokens, 4 times what is needed; "
        "the rest of the text was not looked at."
    )


@pytest.mark.parametrize("layout", ["packed", "documents"])
def test_text_without_a_single_token(tokenizer: Tokenizer, layout: str) -> None:
    with pytest.raises(TextError):
        build_windows([], tokenizer, WindowSettings(window_size=4, layout=layout))


def test_text_shorter_than_a_window_gives_both_numbers(tokenizer: Tokenizer) -> None:
    with pytest.raises(TextError) as caught:
        build_windows(["abc"], tokenizer, WindowSettings(window_size=4))
    error = caught.value
    assert (error.where, error.expected, error.found) == ("text", "at least 4 tokens, one window", "3 tokens")
    assert error.action == "Name a longer text, or set a smaller window size."


@pytest.mark.parametrize("bos", ["window", "document"])
def test_a_bos_that_the_model_does_not_have(tokenizer_without_bos: Tokenizer, bos: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_windows(["abc"], tokenizer_without_bos, WindowSettings(window_size=2, bos=bos))
    assert caught.value.where == "calibration.bos"
    assert caught.value.found == bos


def test_a_window_with_room_for_nothing_but_the_bos(tokenizer: Tokenizer) -> None:
    with pytest.raises(RecipeError, match="at least 2"):
        build_windows(["abc"], tokenizer, WindowSettings(window_size=1, bos="window"))


def test_windows_from_tokens_are_taken_as_they_are() -> None:
    windows = windows_from_tokens(torch.arange(6, dtype=torch.int32).view(2, 3), notes=("written by the model",))
    assert windows.tokens_WS.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert windows.tokens_WS.dtype == torch.int64
    assert windows.lengths_W.tolist() == [3, 3]
    assert (windows.num_windows_requested, windows.num_tokens_available, windows.remainder_tokens) == (2, 6, 0)
    assert windows.sha256 == tokens_sha256(windows.tokens_WS, windows.lengths_W)
    assert windows.notes == ("written by the model",)


def test_the_bundled_text_gives_the_measured_number_of_tokens() -> None:
    bundled = load_tokenizer(bundled_path("story-llama"))
    documents = load_documents(TextSource(source="bundled:story-calibration"))
    windows = build_windows(documents, bundled, WindowSettings(window_size=512))
    assert windows.num_tokens_available == 151_066
    assert tuple(windows.tokens_WS.shape) == (128, 512)
    assert windows.remainder_tokens == 151_066 - 295 * 512
