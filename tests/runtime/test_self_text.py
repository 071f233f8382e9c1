"""Text that the model writes itself."""

from __future__ import annotations

import pytest
import torch

from optgptq.bundled import bundled_path
from optgptq.errors import TextError
from optgptq.models.decoder import Decoder
from optgptq.runtime.load import load_model
from optgptq.runtime.self_text import SelfWriting, write_windows

BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def story() -> Decoder:
    return load_model(bundled_path("bundled:story-llama"))


def write(story: Decoder, *, seed: int = 0, bos: int | None = BOS, eos: tuple[int, ...] = (EOS,)) -> torch.Tensor:
    writing = SelfWriting(temperature=1.0, seed=seed, eos_token_ids=eos)
    return write_windows(story, 5, 33, writing=writing, bos_token_id=bos)


def test_windows_are_full_seeded_and_repeatable(story):
    windows = write(story)
    assert windows.shape == (5, 33)
    assert windows.dtype == torch.int64
    assert 0 <= int(windows.min()) <= int(windows.max()) < 1024
    assert torch.equal(write(story), windows)
    assert not torch.equal(write(story, seed=1), windows)


def test_every_text_begins_with_bos_but_the_first_whose_bos_is_left_out(story):
    writing = SelfWriting(temperature=1.0, eos_token_ids=(EOS,))
    stream = write_windows(story, 4, 500, writing=writing, bos_token_id=BOS).flatten().tolist()
    ends = [position for position, token in enumerate(stream[:-1]) if token == EOS]
    assert ends
    assert all(stream[position + 1] == BOS for position in ends)
    assert stream[0] != BOS


def test_a_model_without_bos_starts_from_its_end_token(story):
    windows = write(story, bos=None)
    assert windows.shape == (5, 33)
    # This model answers an end token with a BOS of its own.
    assert windows[0, 0] == BOS


def test_progress_ends_with_everything_that_is_wanted(story):
    seen = []
    writing = SelfWriting(temperature=1.0, eos_token_ids=(EOS,))
    write_windows(
        story, 3, 20, writing=writing, bos_token_id=BOS, progress=lambda done, wanted: seen.append((done, wanted))
    )
    assert seen[-1] == (60, 60)


def test_nothing_to_start_from_is_said(story):
    with pytest.raises(TextError) as caught:
        write(story, bos=None, eos=())
    assert caught.value.found == "neither in tokenizer and config"
    assert "calibration.source" in caught.value.action


def test_a_model_that_only_ends_is_refused(story):
    everything = tuple(range(1024))
    with pytest.raises(TextError, match="5 tokens in 5 texts"):
        write(story, bos=None, eos=everything)
