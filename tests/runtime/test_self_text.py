"""Text that the model writes itself."""

from __future__ import annotations

import pytest
import torch

from optgptq.bundled import bundled_path
from optgptq.errors import TextError
from optgptq.models.decoder import Decoder
from optgptq.runtime import self_text
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
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


@pytest.mark.parametrize("late", [False, True], ids=["while it starts", "while it writes"])
def test_fewer_texts_are_written_at_a_time_when_memory_runs_out(
    late: bool, story: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = SelfWriting(temperature=1.0, eos_token_ids=(EOS,))
    monkeypatch.setattr(self_text, "_RUNNING", 2)
    expected = write_windows(story, 5, 33, writing=writing, bos_token_id=BOS)
    place, name = (Engine, "step") if late else (self_text, "Engine")
    whole, sizes = getattr(place, name), list[int]()

    def limited(*arguments: object, **names: object) -> object:
        settings = next(part for part in arguments if isinstance(part, EngineSettings | Engine))
        settings = settings.settings if isinstance(settings, Engine) else settings
        sizes.append(settings.max_running or 0)
        if sizes[-1] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return whole(*arguments, **names)

    monkeypatch.setattr(self_text, "_RUNNING", 8)
    monkeypatch.setattr(place, name, limited)
    told: list[str] = []
    found = write_windows(story, 5, 33, writing=writing, bos_token_id=BOS, warn=told.append)
    assert torch.equal(found, expected)
    assert list(dict.fromkeys(sizes)) == [8, 4, 2]
    assert told == [
        "memory ran out: 4 instead of 8 texts are written at a time",
        "memory ran out: 2 instead of 4 texts are written at a time",
    ]
