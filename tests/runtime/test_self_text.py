"""Text that the model writes itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stopped_steps import fresh_journal, stopped_everywhere

from optgptq.bundled import bundled_path
from optgptq.errors import TextError
from optgptq.journal.store import Journal, Steps
from optgptq.models.decoder import Decoder
from optgptq.runtime import self_text
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.kept_texts import KeptTexts
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


def limit_texts(limit: int, place: object, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let memory run out where more than `limit` texts are written at a time; return the list of what is tried."""
    whole, sizes = getattr(place, name), list[int]()

    def limited(*arguments: object, **names: object) -> object:
        settings = next(part for part in arguments if isinstance(part, EngineSettings | Engine))
        settings = settings.settings if isinstance(settings, Engine) else settings
        sizes.append(settings.max_running or 0)
        if sizes[-1] > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return whole(*arguments, **names)

    monkeypatch.setattr(place, name, limited)
    return sizes


@pytest.mark.parametrize("late", [False, True], ids=["while it starts", "while it writes"])
def test_fewer_texts_are_written_at_a_time_when_memory_runs_out(
    late: bool, story: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = SelfWriting(temperature=1.0, eos_token_ids=(EOS,))
    monkeypatch.setattr(self_text, "_RUNNING", 2)
    expected = write_windows(story, 5, 33, writing=writing, bos_token_id=BOS)
    place, name = (Engine, "step") if late else (self_text, "Engine")
    sizes = limit_texts(2, place, name, monkeypatch)
    monkeypatch.setattr(self_text, "_RUNNING", 8)
    told: list[str] = []
    found = write_windows(story, 5, 33, writing=writing, bos_token_id=BOS, warn=told.append)
    assert torch.equal(found, expected)
    assert list(dict.fromkeys(sizes)) == [8, 4, 2]
    assert told == [
        "memory ran out: 4 instead of 8 texts are written at a time",
        "memory ran out: 2 instead of 4 texts are written at a time",
    ]


def written_numbers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of every text that is written from here on (seed 0)."""
    numbers: list[int] = []
    whole: Callable[..., Any] = self_text.generate

    def hearing(engine: Engine, prompts: Sequence[Any], params: Sequence[Any]) -> Any:
        results = whole(engine, prompts, params)
        numbers.extend(each.seed for each in params)
        return results

    monkeypatch.setattr(self_text, "generate", hearing)
    return numbers


@pytest.mark.parametrize(("windows", "size", "bos"), [(5, 33, BOS), (3, 80, None)])
def test_a_stop_at_any_part_changes_no_token(
    windows: int, size: int, bos: int | None, story: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = SelfWriting(temperature=1.0, eos_token_ids=(EOS,))
    expected = write_windows(story, windows, size, writing=writing, bos_token_id=bos)
    monkeypatch.setattr(self_text, "_RUNNING", 2)

    def work(steps: Steps) -> torch.Tensor:
        return write_windows(story, windows, size, writing=writing, bos_token_id=bos, kept=KeptTexts(steps))

    results = stopped_everywhere(tmp_path, work)
    assert len(results) >= 3
    assert all(torch.equal(result, expected) for result in results)


def test_texts_that_are_kept_are_not_written_again(
    story: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "_RUNNING", 2)
    writing = SelfWriting(temperature=1.0, eos_token_ids=(EOS,))
    expected = write_windows(story, 5, 33, writing=writing, bos_token_id=BOS)
    step, left = Engine.step, 80

    def dying(self: Engine) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return step(self)

    steps, numbers = fresh_journal(tmp_path / "work"), written_numbers(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            write_windows(story, 5, 33, writing=writing, bos_token_id=BOS, kept=KeptTexts(steps))
    assert numbers == [0, 1, 2, 3]
    found = write_windows(story, 5, 33, writing=writing, bos_token_id=BOS, kept=KeptTexts(Journal(steps.path, {})))
    assert torch.equal(found, expected)
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("damage", ["torn", "gone", "other tensors", "fewer texts"])
def test_a_part_that_is_damaged_is_written_again(
    damage: str, story: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "_RUNNING", 2)
    writing = SelfWriting(temperature=1.0, eos_token_ids=(EOS,))
    steps, numbers = fresh_journal(tmp_path / "work"), written_numbers(monkeypatch)
    first = write_windows(story, 5, 33, writing=writing, bos_token_id=BOS, kept=KeptTexts(steps))
    numbers.clear()
    path = steps.path / "part-00001.safetensors"
    match damage:
        case "torn":
            path.write_bytes(path.read_bytes()[:-3])
        case "gone":
            path.unlink()
        case "other tensors":
            steps.put("part-00001", {"tokens": torch.zeros(3)}, {})
        case _:
            steps.put("part-00001", {"tokens": torch.arange(3), "lengths": torch.tensor([3])}, {})
    kept = KeptTexts(steps)
    assert torch.equal(write_windows(story, 5, 33, writing=writing, bos_token_id=BOS, kept=kept), first)
    assert numbers == [2, 3]
    kept.forget()
    assert steps.is_empty


def test_memory_that_ran_out_is_remembered(story: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_text, "_RUNNING", 4)
    writing = SelfWriting(temperature=1.0, eos_token_ids=(EOS,))
    steps, told = fresh_journal(tmp_path / "work"), list[str]()
    with monkeypatch.context() as patch:
        limit_texts(1, Engine, "step", patch)
        write_windows(story, 5, 33, writing=writing, bos_token_id=BOS, kept=KeptTexts(steps), warn=told.append)
    steps.forget("part-00001")
    sizes = limit_texts(9, Engine, "step", monkeypatch)
    again: list[str] = []
    kept = KeptTexts(steps)
    write_windows(story, 5, 33, writing=writing, bos_token_id=BOS, kept=kept, warn=again.append)
    assert set(sizes) == {1}
    assert (
        again
        == told
        == [
            "memory ran out: 2 instead of 4 texts are written at a time",
            "memory ran out: 1 instead of 2 texts are written at a time",
        ]
    )
    kept.forget()
    assert steps.is_empty


def test_a_part_is_no_more_than_a_minute_of_work_and_no_less_than_products_need(
    story: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_weights = 1179648 + 1024 * 128
    sizes = []
    for operations in (1, 2 * num_weights * 33 * 50, 10**15):
        monkeypatch.setattr(self_text, "_PART_OPERATIONS", operations)
        sizes.append(self_text._part_size(story, 33))
    assert sizes == [32, 50, 128]
