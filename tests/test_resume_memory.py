"""Memory that runs out, and activations on disk: the job goes on, and says what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizable import tiny_recipe, wide_llama, write_model
from support.stops import StoppedError, folder_bytes, stopped_at_linear

from optgptq.calibration.stream import ActivationStream
from optgptq.errors import CapacityError
from optgptq.quantize import JobOptions, QuantizeResult, quantize
from optgptq.recipe.records import Recipe
from optgptq.reports import events

WEIGHTS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 3, "symmetric": False},
    "shift": {"target_shift": "exact", "shift_strength": "held_out"},
}


def recipe_of(name: str) -> Recipe:
    return tiny_recipe(calibration={"num_windows": 4, "window_size": 16}, **WEIGHTS[name])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return write_model(wide_llama(**sizes), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def references(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuantizeResult]:
    folder = tmp_path_factory.mktemp("references")
    return {name: quantize(model, recipe_of(name), folder / name) for name in WEIGHTS}


def test_batches_shrink_where_memory_runs_out(
    model: Path, references: dict[str, QuantizeResult], tmp_path: Path, monkeypatch: Any
) -> None:
    advance = ActivationStream.advance

    def short_of_memory(self: ActivationStream, layer: Any, stage: Any) -> None:
        if layer.index == 1 and stage == "o" and max(batch.num_windows for batch in self.batches) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")
        advance(self, layer, stage)

    monkeypatch.setattr(ActivationStream, "advance", short_of_memory)
    told: list[events.ProgressEvent] = []
    with pytest.raises(StoppedError):
        quantize(model, recipe_of("gptq"), tmp_path / "out", progress=stopped_at_linear(13))
    result = quantize(model, recipe_of("gptq"), tmp_path / "out", progress=told.append)
    assert [cost["windows_per_batch"] for cost in result.record["decoder_layer_costs"]] == [4, 1]
    shrunk = [warning for warning in result.warnings if "memory ran out" in warning]
    assert shrunk == [
        "decoder layer 1: memory ran out with 4 calibration windows per batch, now 2",
        "decoder layer 1: memory ran out with 2 calibration windows per batch, now 1",
    ]
    first = folder_bytes(references["gptq"].output)
    assert folder_bytes(tmp_path / "out").keys() == first.keys()
    # Layer 0 does not know of it.
    assert result.record["layers"][:7] == references["gptq"].record["layers"][:7]


def test_smaller_batches_are_remembered_before_their_layer_ends(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = ActivationStream.advance

    def short_of_memory(self: ActivationStream, layer: Any, stage: Any) -> None:
        if layer.index == 1 and stage == "o" and max(batch.num_windows for batch in self.batches) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")
        advance(self, layer, stage)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStream, "advance", short_of_memory)
        whole = quantize(model, recipe_of("gptq"), tmp_path / "whole")
        with pytest.raises(StoppedError):
            quantize(model, recipe_of("gptq"), tmp_path / "out", progress=stopped_at_linear(13))
    # There is memory enough now, and the job stays with what it came down to.
    result = quantize(model, recipe_of("gptq"), tmp_path / "out")
    assert [cost["windows_per_batch"] for cost in result.record["decoder_layer_costs"]] == [4, 1]
    assert result.warnings == whole.warnings
    assert folder_bytes(result.output) == folder_bytes(whole.output)


def test_memory_that_does_not_hold_one_window_ends_the_job(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def no_memory(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(ActivationStream, "measure", no_memory)
    with pytest.raises(CapacityError) as caught:
        quantize(model, recipe_of("gptq"), tmp_path / "out")
    assert caught.value.where == "memory, decoder layer 0"
    assert "can't allocate memory" in caught.value.found


def test_activations_on_disk_and_a_stop(model: Path, references: dict[str, QuantizeResult], tmp_path: Path) -> None:
    options = JobOptions(activations="disk", spill_share=float("inf"))
    with pytest.raises(StoppedError):
        quantize(model, recipe_of("shift"), tmp_path / "out", progress=stopped_at_linear(12), options=options)
    quantize(model, recipe_of("shift"), tmp_path / "out", options=options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(references["shift"].output)
