"""Streaming text: pieces are whole characters, and together the text that all tokens decode to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Native
from tokenizers import decoders, models, pre_tokenizers

from optgptq.bundled import bundled_path
from optgptq.data.tokenizer import Tokenizer, load_tokenizer
from optgptq.runtime.detokenizer import MAX_HELD_TOKENS, REPLACEMENT, Decoder, Detokenizer

VOCAB = 1024
EOS = 1


@cache
def bundled() -> Tokenizer:
    return load_tokenizer(bundled_path("story-llama"))


class Counting:
    """A decoder that counts the tokens it is given."""

    def __init__(self, native: Native) -> None:
        self.native = native
        self.num_tokens = 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        self.num_tokens += len(ids)
        return str(self.native.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def ids_of(self, text: str) -> list[int]:
        return list(self.native.encode(text, add_special_tokens=False).ids)


WORDS = ["▁", "▁▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "é", "▁日本", "😀", ".", "\n"]


@cache
def metaspace() -> Native:
    """A unigram tokenizer whose decoder leaves out the first space."""
    native = Native(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((word, -1.0) for word in WORDS)], 0))
    native.pre_tokenizer = pre_tokenizers.Metaspace()
    native.decoder = decoders.Metaspace()
    native.add_special_tokens(["</s>"])
    return native


@cache
def byte_fallback() -> Native:
    """As SentencePiece models are converted: characters that no token has are spelled in bytes."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    native = Native(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    native.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    native.add_special_tokens(["</s>"])
    return native


def streamed(decoder: Decoder, pieces: Sequence[Sequence[int]], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(decoder, skip_special_tokens=skip)
    return [*(detokenizer.add(piece) for piece in pieces), detokenizer.finish()]


def check(decoder: Decoder, pieces: Sequence[Sequence[int]], *, skip: bool) -> None:
    ids = [token_id for piece in pieces for token_id in piece]
    assert "".join(streamed(decoder, pieces, skip=skip)) == decoder.decode(ids, skip_special_tokens=skip)


PIECES = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=4), max_size=30)
# Single bytes, ends of text and a few words: most of what is not UTF-8 comes up.
BROKEN = st.lists(st.lists(st.one_of(st.integers(0, 260), st.just(EOS)), max_size=3), max_size=50)


@settings(max_examples=150, deadline=None)
@given(pieces=PIECES | BROKEN, skip=st.booleans())
@example(pieces=[[EOS]] * 40 + [[300]], skip=True)
def test_any_tokens_of_the_bundled_model(pieces, skip):
    check(bundled(), pieces, skip=skip)


@settings(max_examples=200, deadline=None)
@given(prompt=BROKEN.map(lambda pieces: list(chain(*pieces))), pieces=BROKEN, skip=st.booleans())
def test_after_a_prompt_only_new_text_is_handed_out(prompt, pieces, skip):
    detokenizer = Detokenizer(bundled(), skip_special_tokens=skip, prompt_ids=prompt)
    shown = "".join(detokenizer.add(piece) for piece in pieces) + detokenizer.finish()
    before = bundled().decode(prompt, skip_special_tokens=skip)
    whole = bundled().decode([*prompt, *chain(*pieces)], skip_special_tokens=skip)
    num_common = max(length for length in range(len(before) + 1) if whole.startswith(before[:length]))
    assert shown == whole[num_common:]


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="aé日本語😀👩‍👩‍👧🏽 \n�", max_size=30), skip=st.booleans())
def test_characters_are_handed_out_whole_and_at_once(text, skip):
    ids = bundled().encode(text)
    pieces = streamed(bundled(), [[token_id] for token_id in ids], skip=skip)
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert REPLACEMENT not in "".join(pieces)
        assert pieces[-1] == ""
        for end in range(len(ids) + 1):
            finished = bundled().decode(ids[:end], skip_special_tokens=skip)
            if not finished.endswith(REPLACEMENT):
                assert "".join(pieces[:end]) == finished


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, len(WORDS) + 1), max_size=30), skip=st.booleans(), native=st.sampled_from(["m", "b"])
)
def test_spaces_of_sentencepiece(ids, skip, native):
    decoder = Counting(metaspace() if native == "m" else byte_fallback())
    # Words come after the bytes there.
    ids = [token_id + 256 if native == "b" and token_id > EOS else token_id for token_id in ids]
    check(decoder, [[token_id] for token_id in ids], skip=skip)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20))
def test_characters_spelled_in_bytes(text):
    decoder = Counting(byte_fallback())
    ids = decoder.ids_of(text.replace(" ", "▁"))
    pieces = streamed(decoder, [[token_id] for token_id in ids])
    assert "".join(pieces) == decoder.decode(ids, skip_special_tokens=True)


def test_what_was_handed_out_stays_though_the_run_of_bytes_turns_out_wrong():
    decoder = Counting(byte_fallback())
    euro = [2 + byte for byte in "€".encode()]
    assert streamed(decoder, [euro, [2 + 0xFF], [258]]) == ["€", "", "\ufffd\ufffd\ufffd ", ""]


def of_byte(byte: int) -> int:
    """Return the token of one byte; a byte-level alphabet spells these as the character of the same number."""
    token_id = native_bundled().token_to_id(chr(byte))
    assert token_id is not None
    assert native_bundled().decode([token_id]) == REPLACEMENT
    return token_id


@cache
def native_bundled() -> Native:
    return Native.from_file(str(bundled_path("story-llama") / "tokenizer.json"))


LEAD, CONTINUATION = 0xE2, 0xBF


@pytest.mark.parametrize(
    "ids",
    [
        [5],
        [EOS],
        [99999],  # ids that the tokenizer does not know have no text
        [of_byte(LEAD)],
        [of_byte(CONTINUATION)],
        [of_byte(LEAD), EOS, EOS, of_byte(CONTINUATION)],
        [of_byte(LEAD), *[EOS] * 50],
        [of_byte(0xF0), *[EOS] * 200, *[of_byte(CONTINUATION)] * 2],
    ],
)
@pytest.mark.parametrize("first", [[], [300]])
def test_time_grows_with_the_number_of_tokens(first, ids):
    ids = (first + ids * 3000)[:3000]
    decoder = Counting(native_bundled())
    pieces = streamed(decoder, [[token_id] for token_id in ids])
    assert decoder.num_tokens < 4 * MAX_HELD_TOKENS * len(ids)
    assert "".join(pieces) == decoder.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("byte", [LEAD, CONTINUATION])
def test_text_that_never_comes_to_an_end_of_a_character_is_handed_out_on_the_way(byte):
    pieces = streamed(Counting(native_bundled()), [[of_byte(byte)]] * 100)
    assert pieces[0] == ""
    assert len("".join(pieces[:-1])) > 80


def test_a_prompt_may_end_within_a_character_or_with_the_replacement_character():
    *begin, last = bundled().encode("so 😀")

    def continued(prompt: list[int], ids: list[int]) -> str:
        detokenizer = Detokenizer(bundled(), prompt_ids=prompt)
        return detokenizer.add(ids) + detokenizer.finish()

    assert continued(begin, [last]) == "😀"
    assert continued(begin, bundled().encode("!")) == "!"
    assert continued(bundled().encode("so " + REPLACEMENT), bundled().encode("!")) == "!"
    assert continued(begin, []) == ""


def test_a_space_after_the_prompt_stays():
    decoder = Counting(metaspace())
    prompt, ids = decoder.ids_of("a"), decoder.ids_of("b")
    detokenizer = Detokenizer(decoder, prompt_ids=prompt)
    assert detokenizer.add(ids) == " b"


def test_no_tokens():
    assert streamed(bundled(), []) == [""]
    assert streamed(bundled(), [[], [], []]) == [""] * 4
