"""The sample of a finished checkpoint, and what a program can see in it."""

from __future__ import annotations

import pytest

from optgptq.bundled import bundled_path
from optgptq.evaluation.sample import Sample, write_sample


def sample(text: str, *token_ids: int) -> Sample:
    return Sample(prompt="Once", text=text, token_ids=token_ids, finish_reason="length")


@pytest.mark.parametrize(
    ("written", "warning"),
    [
        (sample("a b", 1, 2), ()),
        (sample("a", 1), ()),
        (sample(""), ("sample: the checkpoint wrote no text after the prompt",)),
        (sample(" \n", 5, 6), ("sample: the checkpoint wrote no text after the prompt",)),
        (sample("!!!", 7, 7, 7), ("sample: the checkpoint wrote the same token 3 times",)),
    ],
)
def test_what_is_plainly_wrong_is_a_warning(written: Sample, warning: tuple[str, ...]) -> None:
    assert written.warnings == warning


def test_the_sample_is_greedy_and_always_the_same() -> None:
    first, second = (write_sample(bundled_path("bundled:story-llama"), "Once upon a time", 8) for _ in range(2))
    assert first == second
    assert first.warnings == ()
    assert first.record() == {
        "prompt": "Once upon a time",
        "text": first.text,
        "num_tokens": 8,
        "finish_reason": "length",
    }
