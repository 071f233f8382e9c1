"""What makes the main job stop, what it says, and what it leaves behind: nothing half-written, nothing old lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizable import tiny_recipe, wide_llama, write_model
from support.texts import write_tokenizer

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.lock import work_folder
from optgptq.checkpoint.writer import ShardWriter, TensorEntry
from optgptq.errors import CapacityError, FormatError, ModelError, OptGPTQError, OutputError, RecipeError, TextError
from optgptq.quantize import quantize
from optgptq.reports import events

GROUPS: dict[str, Any] = {"group_size": 16, "method": "rtn", "calibration": {"num_windows": 2, "window_size": 12}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(wide_llama(), tmp_path_factory.mktemp("model") / "model")


def changed(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Write a copy of the model after `change` worked on its tensors."""
    source = CheckpointFolder.open(model)
    tensors = {name: source.read(name) for name in source.tensors}
    change(tensors)
    folder.mkdir()
    entries = [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = ShardWriter(folder, entries, max_shard_bytes=10**9)
    for name, tensor in tensors.items():
        writer.write(name, tensor.contiguous())
    writer.finish()
    for name in source.side_files:
        (folder / name).write_bytes((model / name).read_bytes())
    return folder


def refused(
    kind: type[OptGPTQError], model: Path, output: Path, *, keeps_work: bool = False, **options: Any
) -> OptGPTQError:
    """Return the error of the job, which has left nothing beside what was there, but for finished decoder layers."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(kind) as caught:
        quantize(model, tiny_recipe(**{**GROUPS, **options}), output)
    left = [work_folder(output)] if keeps_work else []
    assert sorted(output.parent.iterdir()) == sorted([*before, *left])
    return caught.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("source", ["self", "text"])
def test_weights_that_are_not_finite_are_named(
    value: float, name: str, source: str, model: Path, tmp_path: Path
) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 2] = value

    folder = changed(model, tmp_path / "bad", poison)
    (tmp_path / "text.txt").write_text("once upon a time " * 20)
    calibration = {**GROUPS["calibration"], "source": "self" if source == "self" else str(tmp_path / "text.txt")}
    solves_first = source == "text" and "layers.1" in name
    error = refused(ModelError, folder, tmp_path / "out", keeps_work=solves_first, calibration=calibration)
    assert error.where.endswith(name)
    assert "1 of " in error.found


def test_a_missing_tensor_is_named(model: Path, tmp_path: Path) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]

    folder = changed(model, tmp_path / "bad", remove)
    assert refused(ModelError, folder, tmp_path / "out").where.endswith("model.layers.0.mlp.up_proj.weight")


def test_a_wrong_shape_is_named(model: Path, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]

    error = refused(ModelError, changed(model, tmp_path / "bad", cut), tmp_path / "out")
    assert error.where.endswith("model.norm.weight")
    assert (error.expected, error.found) == ("shape [48]", "shape [47]")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(ModelError, tmp_path / "empty", tmp_path / "out")
    refused(ModelError, tmp_path / "absent", tmp_path / "out")


def test_without_a_tokenizer_nothing_is_calibrated(model: Path, tmp_path: Path) -> None:
    folder = changed(model, tmp_path / "bad", lambda tensors: None)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    refused(TextError, folder, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "short"])
def test_a_text_without_a_window_is_refused(text: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text)
    refused(TextError, model, tmp_path / "out", calibration={**GROUPS["calibration"], "source": str(path)})


def test_recipes_that_do_not_fit_the_model(model: Path, tmp_path: Path) -> None:
    assert "48 input columns" in refused(RecipeError, model, tmp_path / "out", group_size=64).expected
    rule = ({"match": "q_proj", "bits": 8},)
    assert "engines load both" in refused(RecipeError, model, tmp_path / "out", rules=rule).expected
    nothing = ({"match": "no_such_thing", "bits": 8},)
    assert "no_such_thing" in refused(RecipeError, model, tmp_path / "out", rules=nothing).found


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_quantized_source_is_refused(form: str, model: Path, tmp_path: Path) -> None:
    first = quantize(model, tiny_recipe(**GROUPS, export={"format": form}), tmp_path / "first").output
    error = refused(ModelError, first, tmp_path / "second")
    assert form in error.found
    assert "optgptq convert" in error.action


def test_an_output_that_exists_is_left_alone(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    assert "--overwrite" in refused(OutputError, model, output).action
    assert (output / "config.json").read_text() == "{}"


def test_overwrite_replaces_the_whole_folder(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "old.txt").write_text("old")
    quantize(model, tiny_recipe(**GROUPS), output, overwrite=True)
    assert not (output / "old.txt").exists()
    assert json.loads((output / "config.json").read_text())["model_type"] == "llama"
    assert list(tmp_path.iterdir()) == [output]


def test_the_output_may_not_touch_the_source(model: Path) -> None:
    for output in (model, model / "inside"):
        with pytest.raises(OutputError):
            quantize(model, tiny_recipe(**GROUPS), output, overwrite=True)
    assert CheckpointFolder.open(model).tensors


class _StopError(Exception):
    pass


@pytest.mark.parametrize("error", [_StopError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["layer", "linear", "verifying"])
def test_an_error_on_the_way_keeps_the_old_folder(
    error: type[BaseException], moment: str, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    quantize(model, tiny_recipe(**GROUPS), output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    work, staging = work_folder(output), tmp_path / ".out.partial"

    def interrupt(event: events.ProgressEvent) -> None:
        hidden = [path for path in tmp_path.iterdir() if path != output]
        assert set(hidden) <= {work, staging}
        if moment == "layer" and isinstance(event, events.DecoderLayerStarted) and event.index == 1:
            raise error
        if moment == "linear" and isinstance(event, events.LinearFinished) and event.name.endswith("1.mlp.up_proj"):
            raise error
        if moment == "verifying" and isinstance(event, events.PhaseStarted) and event.name == "verifying":
            raise error

    with pytest.raises(error):
        quantize(model, tiny_recipe(**{**GROUPS, "bits": 8}), output, overwrite=True, progress=interrupt)
    assert sorted(tmp_path.iterdir()) == [work, output]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_what_is_written_is_read_back_before_it_is_published(model: Path, tmp_path: Path) -> None:
    """Bytes that change on the disk between writing and verifying are noticed."""
    output = tmp_path / "out"

    def damage(event: events.ProgressEvent) -> None:
        if isinstance(event, events.PhaseStarted) and event.name == "verifying":
            staging = tmp_path / ".out.partial"
            folder = CheckpointFolder.open(staging)
            info = folder.tensors["model.layers.1.mlp.down_proj.qweight"]
            with (staging / info.file).open("r+b") as file:
                file.seek(info.begin + 5)
                (byte,) = file.read(1)
                file.seek(info.begin + 5)
                file.write(bytes([byte ^ 1]))

    with pytest.raises(FormatError, match=r"linear model\.layers\.1\.mlp\.down_proj"):
        quantize(model, tiny_recipe(**GROUPS), output, progress=damage)
    assert list(tmp_path.iterdir()) == [work_folder(output)]
    quantize(model, tiny_recipe(**GROUPS), output)
    assert list(tmp_path.iterdir()) == [output]


def test_a_disk_that_is_too_small_is_noticed_before_work_begins(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, num_bytes: int) -> None:
        raise CapacityError(str(folder), expected=f"{num_bytes} bytes", found="less", action="Free some.")

    monkeypatch.setattr("optgptq.job.require_disk_space", full)
    seen: list[events.ProgressEvent] = []
    with pytest.raises(CapacityError):
        quantize(model, tiny_recipe(**GROUPS), tmp_path / "out", progress=seen.append)
    assert not [event for event in seen if isinstance(event, events.DecoderLayerStarted | events.PhaseStarted)]
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_only_read(model: Path, tmp_path: Path) -> None:
    folder = changed(model, tmp_path / "copy", lambda tensors: None)
    write_tokenizer(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    quantize(folder, tiny_recipe(**GROUPS), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
