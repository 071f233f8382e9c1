"""A job that was stopped goes on to the bytes of one that was not."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizable import tiny_recipe, wide_llama, write_model
from support.stops import StoppedError, folder_bytes, run_with_stops, stopped_at_linear, watched_puts

from optgptq.checkpoint.lock import work_folder
from optgptq.errors import CapacityError, ModelError, OutputError
from optgptq.journal.store import open_journal
from optgptq.kept_work import kept_work
from optgptq.quantize import JobOptions, QuantizeResult, quantize
from optgptq.recipe.records import Recipe
from optgptq.reports import events

TEXT = {"num_windows": 4, "window_size": 16}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"weights": {"method": "rtn"}},
    "gptq": {"weights": {"method": "gptq", "bits": 3, "symmetric": False}},
    "one pass": {"weights": {"true_sequential": False}},
    "compressed": {"weights": {"group_size": 16}, "export": {"format": "compressed-tensors"}},
    "attention_aware": {"weights": {"method": "attention_aware"}},
    "gptqt": {"weights": {"method": "gptqt", "bits": 3, "group_size": 32}, "export": {"format": "optgptq"}},
    "binary": {"weights": {"method": "binary", "bits": 2, "group_size": 32}, "export": {"format": "optgptq"}},
    "norms": {"norm_tweaking": {"steps": 3, "learning_rate": 0.01}},
    "shift": {"weights": {"target_shift": "exact", "shift_strength": "held_out"}},
    "gptaq": {"weights": {"target_shift": "gptaq", "shift_strength": 0.5}},
    "fp8": {"export": {"format": "compressed-tensors"}, "kv_cache": {"fp8_scales": "head"}},
    "rotation": {"transform": {"fold_norms": True, "residual_rotation": "hadamard"}},
    "dense parts": {"weights": {"keep_dense": ("layers.1.self_attn.[qkv]_proj", "layers.0.mlp.down_proj")}},
    "small batches": {"calibration": {**TEXT, "windows_per_batch": 1, "moment_stream": "full_precision"}},
}


def recipe_of(name: str) -> Recipe:
    values = tiny_recipe(calibration=TEXT).model_dump(exclude_unset=True)
    for section, fields in METHODS[name].items():
        values[section] = {**values.get(section, {}), **fields}
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return write_model(wide_llama(**sizes), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def references(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuantizeResult]:
    """Results of jobs that were not stopped, by name."""

    class Results(dict[str, QuantizeResult]):
        def __missing__(self, name: str) -> QuantizeResult:
            folder = tmp_path_factory.mktemp("reference")
            self[name] = quantize(model, recipe_of(name), folder / "out")
            return self[name]

    return Results()


@pytest.mark.parametrize("name", METHODS)
def test_stopped_after_every_step(
    name: str, model: Path, references: dict[str, QuantizeResult], tmp_path: Path
) -> None:
    result, steps = run_with_stops(model, recipe_of(name), tmp_path / "out")
    stages = ["qkv", "o", "gate_up", "down"]
    expected = [step for layer in ("layer-00000", "layer-00001") for step in [f"{layer}.{s}" for s in stages] + [layer]]
    text = [step for step in steps if step.startswith("windows.")]
    assert steps[: len(text) + 1] == [*(f"windows.part-{number:05d}" for number in range(len(text))), "windows"]
    rest = ["error_maps", "error_maps", "published", "error_maps", "published"]
    assert steps[len(text) + 1 :] == [*expected, *rest]
    assert folder_bytes(tmp_path / "out") == folder_bytes(references[name].output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    manifest = json.loads((tmp_path / "out" / "optgptq_manifest.json").read_text())
    manifest.pop("files")
    assert {key: result.record[key] for key in manifest} == manifest
    assert result.record["timings"].keys() == references[name].record["timings"].keys()
    assert [cost["index"] for cost in result.record["decoder_layer_costs"]] == [0, 1]


@pytest.mark.parametrize("name", ["gptq", "attention_aware", "norms", "shift", "fp8", "binary"])
def test_streams_are_read_or_run_again_to_the_same_bits(
    name: str, model: Path, references: dict[str, QuantizeResult], tmp_path: Path
) -> None:
    seen: list[str] = []
    with pytest.raises(StoppedError), watched_puts(seen.append):
        quantize(
            model,
            recipe_of(name),
            tmp_path / "out",
            progress=stopped_at_linear(12),
            options=JobOptions(spill_share=float("inf")),
        )
    assert "stream-00000" in seen
    told: list[events.ProgressEvent] = []
    quantize(model, recipe_of(name), tmp_path / "out", progress=told.append)
    phases = [event.name for event in told if isinstance(event, events.PhaseStarted)]
    assert "resuming" in phases
    assert "running finished layers" not in phases
    assert folder_bytes(tmp_path / "out") == folder_bytes(references[name].output)


@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_a_damaged_spill_is_made_up_for(
    damage: str, model: Path, references: dict[str, QuantizeResult], tmp_path: Path
) -> None:
    run_with = JobOptions(spill_share=float("inf"))
    with pytest.raises(StoppedError):
        quantize(model, recipe_of("shift"), tmp_path / "out", progress=stopped_at_linear(12), options=run_with)
    (part, *_) = sorted(work_folder(tmp_path / "out").glob("stream-00000.quantized-*"))
    if damage == "gone":
        part.unlink()
    else:
        os.truncate(part, part.stat().st_size - 3)
    quantize(model, recipe_of("shift"), tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(references["shift"].output)


@pytest.mark.parametrize("linear", [1, 2, 3, 4, 6, 8, 13])
def test_stopped_in_the_middle_of_a_stage(
    linear: int, model: Path, references: dict[str, QuantizeResult], tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        quantize(model, recipe_of("gptq"), tmp_path / "out", progress=stopped_at_linear(linear))
    told: list[events.ProgressEvent] = []
    quantize(model, recipe_of("gptq"), tmp_path / "out", progress=told.append)
    solved = sum(isinstance(event, events.LinearFinished) for event in told)
    kept = max(count for count in (0, 3, 4, 6, 7, 10, 11, 13, 14) if count < linear or count == 0)
    assert solved == 14 - kept
    assert folder_bytes(tmp_path / "out") == folder_bytes(references["gptq"].output)


@pytest.mark.parametrize("moment", ["writing", "verifying"])
def test_stopped_while_the_result_is_written(
    moment: str, model: Path, references: dict[str, QuantizeResult], tmp_path: Path
) -> None:
    def stop(event: events.ProgressEvent) -> None:
        if isinstance(event, events.PhaseStarted) and event.name == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, recipe_of("gptq"), tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    told: list[events.ProgressEvent] = []
    result = quantize(model, recipe_of("gptq"), tmp_path / "out", progress=told.append)
    assert not any(isinstance(event, events.LinearFinished) for event in told)
    assert folder_bytes(tmp_path / "out") == folder_bytes(references["gptq"].output)
    assert [session["ended"] for session in result.record["sessions"]] == ["interrupted", "finished"]
    assert [session["first_layer"] for session in result.record["sessions"]] == [0, None]


def stopped(model: Path, output: Path, *, recipe: Recipe | None = None, linear: int = 9) -> None:
    with pytest.raises(StoppedError):
        quantize(model, recipe or recipe_of("gptq"), output, progress=stopped_at_linear(linear))


def test_another_recipe_is_refused_and_told_what_differs(
    model: Path, references: dict[str, QuantizeResult], tmp_path: Path
) -> None:
    stopped(model, tmp_path / "out")
    other = recipe_of("gptq").model_copy(deep=True)
    other = Recipe.model_validate(
        {**other.model_dump(exclude_unset=True), "weights": {"bits": 4, "group_size": -1, "damp_ratio": 0.02}}
    )
    with pytest.raises(OutputError) as caught:
        quantize(model, other, tmp_path / "out")
    assert "recipe.weights.bits was 3, is 4" in caught.value.found
    assert "recipe.weights.damp_ratio was 0.01, is 0.02" in caught.value.found
    assert "drop its finished decoder layer" in caught.value.action
    quantize(model, other, tmp_path / "other", options=JobOptions(restart=True))
    quantize(model, recipe_of("gptq"), tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(references["gptq"].output)
    stopped(model, tmp_path / "again")
    quantize(model, other, tmp_path / "again", options=JobOptions(restart=True))
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "other")


def test_a_name_or_a_description_decides_nothing(model: Path, tmp_path: Path) -> None:
    stopped(model, tmp_path / "out")
    told: list[events.ProgressEvent] = []
    named = recipe_of("gptq").model_copy(update={"name": "other", "description": "other"})
    quantize(model, named, tmp_path / "out", progress=told.append)
    assert sum(isinstance(event, events.LinearFinished) for event in told) == 7


def copied(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def flip_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def test_another_source_is_refused(model: Path, tmp_path: Path) -> None:
    source = copied(model, tmp_path / "source")
    stopped(source, tmp_path / "out")
    before = (source / "model.safetensors").read_bytes()
    flip_a_weight(source)
    with pytest.raises(OutputError, match=r"model\.model\.safetensors\.sha256 was [0-9a-f]{16}\.\.\., is"):
        quantize(source, recipe_of("gptq"), tmp_path / "out")
    (source / "model.safetensors").write_bytes(before)
    quantize(source, recipe_of("gptq"), tmp_path / "out")


def test_a_copy_of_the_source_is_the_same_source(
    model: Path, references: dict[str, QuantizeResult], tmp_path: Path
) -> None:
    stopped(copied(model, tmp_path / "source"), tmp_path / "out")
    quantize(copied(model, tmp_path / "moved"), recipe_of("gptq"), tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(references["gptq"].output)


def test_a_source_that_changes_meanwhile_is_noticed(model: Path, tmp_path: Path) -> None:
    source = copied(model, tmp_path / "source")

    def change(event: events.ProgressEvent) -> None:
        if isinstance(event, events.DecoderLayerFinished) and event.index == 1:
            (source / "tokenizer.json").write_bytes(before + b" ")

    before = (source / "tokenizer.json").read_bytes()
    with pytest.raises(ModelError, match="other content"):
        quantize(source, recipe_of("gptq"), tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()
    (source / "tokenizer.json").write_bytes(before)
    told: list[events.ProgressEvent] = []
    quantize(source, recipe_of("gptq"), tmp_path / "out", progress=told.append)
    assert not any(isinstance(event, events.DecoderLayerFinished) for event in told)


def test_another_text_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a journal " * 40)
    values = recipe_of("gptq").model_dump(exclude_unset=True)
    values["calibration"]["source"] = str(text)
    recipe = Recipe.model_validate(values)
    stopped(model, tmp_path / "out", recipe=recipe)
    text.write_text("once upon a time there was another one " * 40)
    with pytest.raises(OutputError, match="tokens_sha256 was "):
        quantize(model, recipe, tmp_path / "out")


@pytest.mark.parametrize("step", ["windows", "layer-00000.qkv", "layer-00000.down", "layer-00000", "layer-00001.qkv"])
@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_damaged_steps_are_done_again(
    step: str, damage: str, model: Path, references: dict[str, QuantizeResult], tmp_path: Path
) -> None:
    stopped(model, tmp_path / "out", linear=11)
    path = work_folder(tmp_path / "out") / f"{step}.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(bytes(data[: len(data) // 2]))
    else:
        data[-1] ^= 4
        path.write_bytes(bytes(data))
    quantize(model, recipe_of("gptq"), tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(references["gptq"].output)


@pytest.mark.parametrize("is_replaced", [True, False])
def test_killed_between_publishing_and_removing_the_journal(
    is_replaced: bool, model: Path, references: dict[str, QuantizeResult], tmp_path: Path, monkeypatch: Any
) -> None:
    output = tmp_path / "out"
    if is_replaced:
        output.mkdir()
        (output / "config.json").write_text("{}")

    def die(journal: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("optgptq.journal.store.Journal.remove", die)
        with pytest.raises(StoppedError):
            quantize(model, recipe_of("gptq"), output, overwrite=is_replaced)
    assert folder_bytes(output) == folder_bytes(references["gptq"].output)
    told: list[events.ProgressEvent] = []
    result = quantize(model, recipe_of("gptq"), output, progress=told.append)
    assert not any(isinstance(event, events.DecoderLayerStarted) for event in told)
    assert result.bits_per_weight == references["gptq"].bits_per_weight
    assert result.record["layers"] == references["gptq"].record["layers"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="one that exists"):
        quantize(model, recipe_of("gptq"), output)


def test_another_job_after_one_that_was_published(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def die(journal: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("optgptq.journal.store.Journal.remove", die)
        with pytest.raises(StoppedError):
            quantize(model, recipe_of("gptq"), tmp_path / "out")
    with pytest.raises(OutputError, match="one that exists"):
        quantize(model, recipe_of("rtn"), tmp_path / "out")
    quantize(model, recipe_of("rtn"), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_job_at_a_time(model: Path, tmp_path: Path) -> None:
    stopped(model, tmp_path / "out")
    with (
        open_journal(work_folder(tmp_path / "out")),
        pytest.raises(OutputError, match="another one that is at work"),
    ):
        quantize(model, recipe_of("gptq"), tmp_path / "out")


def test_a_disk_that_fills_up_keeps_what_is_there(
    model: Path, references: dict[str, QuantizeResult], tmp_path: Path
) -> None:
    def full(name: str) -> None:
        if name == "layer-00001.o":
            raise CapacityError("disk", expected="room", found=os.strerror(errno.ENOSPC), action="Free space.")

    with pytest.raises(CapacityError), watched_puts(full):
        quantize(model, recipe_of("gptq"), tmp_path / "out")
    assert kept_work(tmp_path / "out") == (
        "1 finished decoder layer is kept. Run the same command again: it goes on at decoder layer 2 of 2."
    )
    quantize(model, recipe_of("gptq"), tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(references["gptq"].output)
    assert kept_work(tmp_path / "out") is None


def test_a_disk_that_is_full_of_spills_does_not_stop_the_job(
    model: Path, references: dict[str, QuantizeResult], tmp_path: Path
) -> None:
    def full(name: str) -> None:
        if name.startswith("stream-"):
            raise CapacityError("disk", expected="room", found="none", action="Free space.")

    with watched_puts(full):
        quantize(model, recipe_of("gptq"), tmp_path / "out", options=JobOptions(spill_share=float("inf")))
    assert folder_bytes(tmp_path / "out") == folder_bytes(references["gptq"].output)


def test_other_threads_are_told(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    stopped(model, tmp_path / "out")
    monkeypatch.setattr("optgptq.job_sessions.native_name", lambda: "another path")
    result = quantize(model, recipe_of("gptq"), tmp_path / "out")
    (told,) = [warning for warning in result.warnings if "went on with other means" in warning]
    assert f"another path, {torch.get_num_threads()} threads" in told
    manifest = json.loads((tmp_path / "out" / "optgptq_manifest.json").read_text())
    assert told in manifest["warnings"]
