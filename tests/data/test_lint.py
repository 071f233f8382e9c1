from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.texts import write_tokenizer

from optgptq.data.lint import lint
from optgptq.data.tokenizer import Tokenizer, load_tokenizer
from optgptq.data.windows import Windows, windows_from_tokens


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path))


@pytest.fixture
def good() -> Windows:
    return windows_from_tokens(torch.arange(2, 202).view(10, 20))


def test_a_good_text_gives_no_warning(good: Windows, tokenizer: Tokenizer) -> None:
    assert lint(good, tokenizer, widest_input=50, max_position=20) == ()
    assert lint(good, tokenizer, widest_input=50, max_position=None) == ()


@pytest.mark.parametrize(
    ("widest_input", "warning"),
    [
        (
            201,
            "200 calibration tokens cannot fill the Hessian of the widest linear, which has 201 inputs; "
            "use at least 804.",
        ),
        (
            200,
            "200 calibration tokens are few for the Hessian of the widest linear, which has 200 inputs; "
            "800 or more are advised.",
        ),
    ],
)
def test_too_few_tokens(good: Windows, tokenizer: Tokenizer, widest_input: int, warning: str) -> None:
    assert lint(good, tokenizer, widest_input=widest_input, max_position=None) == (warning,)


def test_without_linears_no_number_of_tokens_is_too_few(good: Windows, tokenizer: Tokenizer) -> None:
    assert lint(good, tokenizer, widest_input=None, max_position=None) == ()


def test_padding_is_not_counted_as_text(good: Windows, tokenizer: Tokenizer) -> None:
    short = replace(good, lengths_W=torch.ones(10, dtype=torch.int64))
    warnings = lint(short, tokenizer, widest_input=5, max_position=None)
    assert warnings[0].startswith("10 calibration tokens are few")
    assert warnings[1].startswith("The text uses 10 of 258 tokens of the vocabulary")


def test_fewer_windows_than_asked_for(good: Windows, tokenizer: Tokenizer) -> None:
    fewer = replace(good, num_windows_requested=128)
    assert lint(fewer, tokenizer, widest_input=1, max_position=None) == (
        "The text fills 10 windows of 20 tokens; 128 were asked for.",
    )


def test_duplicates(good: Windows, tokenizer: Tokenizer) -> None:
    repeated = windows_from_tokens(torch.cat([good.tokens_WS, good.tokens_WS[:3]]))
    repeated = replace(repeated, num_duplicate_documents=4)
    assert lint(repeated, tokenizer, widest_input=1, max_position=None) == (
        "3 of 13 windows repeat an earlier window.",
        "4 documents repeat an earlier document.",
    )


def test_a_missing_bos(good: Windows, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "bos", adds_bos=True))
    (warning,) = lint(good, tokenizer, widest_input=1, max_position=None)
    assert warning.startswith("The model's tokenizer puts a BOS before every text and no window holds one;")
    with_bos = good.tokens_WS.clone()
    with_bos[0, 0] = 0
    assert lint(windows_from_tokens(with_bos), tokenizer, widest_input=1, max_position=None) == ()


def test_windows_longer_than_the_model_allows(good: Windows, tokenizer: Tokenizer) -> None:
    assert lint(good, tokenizer, widest_input=1, max_position=19) == (
        "Windows of 20 tokens are longer than the 19 positions the model allows.",
    )


def test_text_of_few_words(tokenizer: Tokenizer) -> None:
    windows = windows_from_tokens(torch.tensor([[5, 6, 7, 8], [6, 5, 7, 8]]))
    (warning,) = lint(windows, tokenizer, widest_input=1, max_position=None)
    assert warning.startswith("The text uses 4 of 258 tokens of the vocabulary")
