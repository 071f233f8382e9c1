"""What is left of a job when its output is safe: gates, the run record, and nothing that could take the output away."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from support.quantizable import tiny_recipe, wide_llama, write_model
from support.stops import StoppedError, folder_bytes

from optgptq.checkpoint.lock import work_folder
from optgptq.errors import CapacityError, NumericalError, OutputError
from optgptq.journal.store import KEY_FILE
from optgptq.kept_work import kept_bytes, kept_work
from optgptq.quantize import JobOptions, quantize
from optgptq.reports import events
from optgptq.reports.run_record import read_run_record, record_path

RECIPE = tiny_recipe(calibration={"num_windows": 4, "window_size": 16})
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return write_model(wide_llama(**sizes), tmp_path_factory.mktemp("model") / "model")


def die(*arguments: object, **named: object) -> None:
    raise StoppedError


@pytest.fixture
def stopped_at_gates(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output whose gates have not been judged."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("optgptq.quantize.run_gates", die)
        with pytest.raises(StoppedError):
            quantize(model, RECIPE, output)
    return output


def solved_layers(told: list[events.ProgressEvent]) -> int:
    return sum(isinstance(event, events.DecoderLayerFinished) for event in told)


def test_only_gates_and_record_are_left(stopped_at_gates: Path, model: Path) -> None:
    before = folder_bytes(stopped_at_gates)
    assert kept_work(stopped_at_gates) == (
        "out is complete. Run the same command again: gates and the run record are what is left."
    )
    told: list[events.ProgressEvent] = []
    options = JobOptions(record=record_path(stopped_at_gates))
    result = quantize(model, RECIPE, stopped_at_gates, progress=told.append, options=options)
    assert solved_layers(told) == 0
    assert folder_bytes(stopped_at_gates) == before
    found = read_run_record(stopped_at_gates)
    assert not found.problem
    assert len(found.content["error_maps"]) == len(result.record["error_maps"]) == 6
    assert not work_folder(stopped_at_gates).exists()


def test_a_full_disk_does_not_keep_gates_from_being_judged(
    stopped_at_gates: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 100, 0))
    assert kept_bytes(stopped_at_gates) > sum(len(data) for data in folder_bytes(stopped_at_gates).values())
    quantize(model, RECIPE, stopped_at_gates)
    assert not work_folder(stopped_at_gates).exists()


def test_a_restart_that_is_refused_drops_nothing(stopped_at_gates: Path, model: Path) -> None:
    kept = sorted(path.name for path in work_folder(stopped_at_gates).iterdir())
    other = RECIPE.model_copy(update={"weights": RECIPE.weights.model_copy(update={"bits": 3})})
    for recipe, options in ((RECIPE, JobOptions(restart=True)), (other, JobOptions())):
        with pytest.raises(OutputError, match="one that exists"):
            quantize(model, recipe, stopped_at_gates, options=options)
        assert set(kept) <= {path.name for path in work_folder(stopped_at_gates).iterdir()}
    told: list[events.ProgressEvent] = []
    quantize(model, RECIPE, stopped_at_gates, progress=told.append)
    assert solved_layers(told) == 0


def test_a_restart_that_may_overwrite_begins_anew(stopped_at_gates: Path, model: Path) -> None:
    told: list[events.ProgressEvent] = []
    quantize(model, RECIPE, stopped_at_gates, overwrite=True, progress=told.append, options=JobOptions(restart=True))
    assert solved_layers(told) == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        NumericalError("x", expected="y", found="z", action="Do."),
        CapacityError("disk", expected="room", found="none", action="Free space."),
    ],
)
def test_maps_that_cannot_be_made_stop_nothing(
    error: Exception, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("optgptq.job.Job.error_maps", fail)
    told: list[events.ProgressEvent] = []
    result = quantize(model, RECIPE, tmp_path / "out", progress=told.append)
    assert result.record["error_maps"] == []
    assert any(isinstance(event, events.WarningRaised) and "no error maps" in event.message for event in told)
    assert "no error maps" in result.record["warnings"][-1]
    assert result.warnings == tuple(result.record["warnings"])


def test_a_source_that_was_touched_is_the_same_source(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(model, source)

    def touch(event: events.ProgressEvent) -> None:
        if isinstance(event, events.DecoderLayerFinished):
            (source / "config.json").touch()

    touched = quantize(source, RECIPE, tmp_path / "out", progress=touch)
    assert folder_bytes(touched.output) == folder_bytes(quantize(model, RECIPE, tmp_path / "plain").output)


@pytest.mark.parametrize("name", ["notes.txt", "folder"])
def test_a_folder_of_somebody_else_is_not_emptied(name: str, model: Path, tmp_path: Path) -> None:
    place = work_folder(tmp_path / "out") / name
    place.mkdir(parents=True)
    with pytest.raises(OutputError, match=name):
        quantize(model, RECIPE, tmp_path / "out")
    assert place.is_dir()


def test_steps_with_a_damaged_key_are_not_dropped(model: Path, tmp_path: Path) -> None:
    def stop(event: events.ProgressEvent) -> None:
        if isinstance(event, events.DecoderLayerFinished):
            raise StoppedError

    output = tmp_path / "out"
    with pytest.raises(StoppedError):
        quantize(model, RECIPE, output, progress=stop)
    key = work_folder(output) / KEY_FILE
    whole = key.read_bytes()
    key.write_bytes(whole[:40])
    with pytest.raises(OutputError, match=r"damaged job\.json"):
        quantize(model, RECIPE, output)
    key.write_bytes(whole)
    told: list[events.ProgressEvent] = []
    quantize(model, RECIPE, output, progress=told.append)
    assert solved_layers(told) == 1
