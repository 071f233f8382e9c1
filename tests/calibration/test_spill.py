"""Activations go to the journal only where that is cheap, and come back as they were."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizable import tiny_recipe, wide_llama, write_model

from optgptq.calibration.layer import LayerCalibration
from optgptq.calibration.spill import Spills
from optgptq.calibration.start import start_calibration
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.windows import windows_from_tokens
from optgptq.journal.store import Journal, open_journal
from optgptq.models.registry import model_spec


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    return CheckpointFolder.open(write_model(wide_llama(), tmp_path_factory.mktemp("model") / "model"))


def calibration_of(source: CheckpointFolder, **calibration: Any) -> LayerCalibration:
    generator = torch.Generator().manual_seed(3)
    windows = windows_from_tokens(torch.randint(1, 61, (5, 7), generator=generator))
    return start_calibration(
        source,
        model_spec(source),
        tiny_recipe(calibration={"windows_per_batch": 2, **calibration}),
        windows,
        dtype=torch.float32,
        device=torch.device("cpu"),
        stage_started=lambda index, stage: None,
    )


def begun(journal: Journal) -> Journal:
    journal.begin({"job": 1})
    return journal


def test_what_was_kept_comes_back_bit_for_bit(source: CheckpointFolder, tmp_path: Path) -> None:
    with open_journal(tmp_path / "work") as journal:
        spills = Spills(begun(journal), share=float("inf"))
        kept, fresh = calibration_of(source), calibration_of(source)
        for batch in kept.quantized.batches:
            batch.state = type(batch.state)(hidden_BSM=torch.randn_like(batch.state.hidden_BSM))
        spills.keep(0, kept)
        spills.keep(1, kept)
        assert journal.get("stream-00000") is None
        assert spills.newest(2) == 1
        assert spills.newest(1) is None
        assert spills.restore(1, fresh)
        for found, wanted in zip(fresh.quantized.batches, kept.quantized.batches, strict=True):
            assert torch.equal(found.state.hidden_BSM, wanted.state.hidden_BSM)


def test_other_batches_and_torn_files_change_nothing(source: CheckpointFolder, tmp_path: Path) -> None:
    with open_journal(tmp_path / "work") as journal:
        spills = Spills(begun(journal), share=float("inf"))
        spills.keep(0, calibration_of(source))
        assert not spills.restore(0, calibration_of(source, windows_per_batch=3))
        assert not spills.restore(1, calibration_of(source))
        fresh = calibration_of(source)
        before = [batch.kept for batch in fresh.quantized.batches]
        journal.forget("stream-00000.quantized-00001")
        assert not spills.restore(0, fresh)
        assert [batch.kept for batch in fresh.quantized.batches] == before


def test_spilling_takes_its_share_of_the_time_and_no_more(
    source: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only the test moves: a layer takes 10 seconds, a spill 1, and 3 percent are allowed."""
    now = 0.0
    monkeypatch.setattr("optgptq.calibration.spill.time.perf_counter", lambda: now)
    put = Journal.put

    def slow(self: Journal, name: str, *rest: Any) -> None:
        nonlocal now
        put(self, name, *rest)
        now += 0.0 if "." in name else 1.0

    monkeypatch.setattr(Journal, "put", slow)
    with open_journal(tmp_path / "work") as journal:
        spills, calibration = Spills(begun(journal), share=0.03), calibration_of(source)
        spilled = []
        for index in range(40):
            now += 10.0
            before = now
            spills.keep(index, calibration)
            if now > before:
                spilled.append(index)
    # The first cost nobody knew; from then on 1 second is spent every 33.
    assert spilled[0] == 0
    assert 10 <= len(spilled) <= 13
    assert all(later - earlier >= 3 for earlier, later in itertools.pairwise(spilled))


def test_no_share_is_no_spill(source: CheckpointFolder, tmp_path: Path) -> None:
    with open_journal(tmp_path / "work") as journal:
        Spills(begun(journal), share=0.0).keep(0, calibration_of(source))
        assert journal.is_empty
