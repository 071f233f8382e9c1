"""What makes a job with a KV cache stop, what it says, and that nothing is left behind."""

from __future__ import annotations

import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizable import tiny_model, write_model

from optgptq import cache_job
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.lock import work_folder
from optgptq.errors import FormatError, ModelError, NumericalError, OptGPTQError, RecipeError
from optgptq.formats.kv_cache_keys import PARAMS_FILE
from optgptq.kv_calibration.calibrate import CalibratedCache
from optgptq.quantize import quantize
from optgptq.recipe.records import Recipe
from optgptq.runtime.llm import LLM

TEXT = {"num_windows": 2, "window_size": 16, "full_precision_windows": 0}


def recipe_of(*, calibration: dict[str, Any] | None = None, **kv_cache: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "weights": {"method": "none"},
            "kv_cache": {"bits": 4, "recent_tokens": 0, "sink_tokens": 1, **kv_cache},
            "calibration": {**TEXT, **(calibration or {})},
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tiny_model("llama-rope_dynamic", max_position_embeddings=512), tmp_path_factory.mktemp("m") / "m"
    )


def refused(kind: type[OptGPTQError], model: Path, output: Path, recipe: Recipe) -> OptGPTQError:
    """Return the error of the job, which has left nothing beside what was there."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(kind) as caught:
        quantize(model, recipe, output)
    left = [path for path in output.parent.iterdir() if path != work_folder(output)]
    assert sorted(left) == before
    return caught.value


@pytest.mark.parametrize(("name", "head_dim"), [("llama-grouped_query", 4), ("qwen3-norms", 10)])
def test_heads_that_do_not_split(name: str, head_dim: int, tmp_path: Path) -> None:
    folder = write_model(tiny_model(name), tmp_path / "model")
    error = refused(ModelError, folder, tmp_path / "out", recipe_of())
    assert (error.where, error.found) == ("kv_cache.bits", f"{head_dim} channels")
    assert error.expected == "heads whose channels are a multiple of 8, which codes are packed from"
    assert error.action == (
        "Set kv_cache.bits=16 and give the job another task (a weights.method, gqa.group or a transform) "
        "for this model."
    )


def test_layers_that_there_are_not(model: Path, tmp_path: Path) -> None:
    error = refused(RecipeError, model, tmp_path / "out", recipe_of(skip_layers="1-3"))
    assert (error.where, error.found) == ("kv_cache.skip_layers", "3")


def test_a_model_whose_values_are_clipped_takes_no_scales(tmp_path: Path) -> None:
    clipped = tiny_model("mpt-alibi", d_model=32, attn_config={"alibi": True, "clip_qkv": 1.5})
    folder = write_model(clipped, tmp_path / "model")
    error = refused(ModelError, folder, tmp_path / "out", recipe_of(fold=True))
    assert error.where == "kv_cache.fold, decoder layer 0"
    assert "clipped at 1.5" in error.found
    assert error.action == "Set kv_cache.fold=false for this model: its scales are then applied at run time."
    quantize(folder, recipe_of(), tmp_path / "out")


def test_one_window_is_too_few(model: Path, tmp_path: Path) -> None:
    error = refused(RecipeError, model, tmp_path / "out", recipe_of(calibration={"num_windows": 1}))
    assert error.where == "calibration.num_windows"
    error = refused(RecipeError, model, tmp_path / "out", recipe_of(num_windows=1))
    assert (error.where, error.found) == ("kv_cache.num_windows", "1")
    quantize(model, recipe_of(num_windows=1, calibrated=False), tmp_path / "out")


def test_windows_without_a_key_that_is_read_from_codes(model: Path, tmp_path: Path) -> None:
    error = refused(RecipeError, model, tmp_path / "out", recipe_of(sink_tokens=4, recent_tokens=12))
    assert (error.where, error.found) == (
        "calibration.window_size",
        "16 tokens, with the first 4 and the last 12 exact",
    )
    quantize(model, recipe_of(sink_tokens=4, recent_tokens=12, calibrated=False), tmp_path / "out")


def test_a_calibration_that_fails_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> CalibratedCache:
        raise NumericalError("keys", expected="finite", found="NaN", action="Check the weights of the model.")

    monkeypatch.setattr(cache_job, "calibrate_cache", fail)
    assert refused(NumericalError, model, tmp_path / "out", recipe_of()).where == "keys"


def test_parameters_that_are_not_read_back_as_they_were_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = cache_job.write_cache_setup

    def write_other(folder: Path, scheme: Any, layers: Any, **told: Any) -> None:
        write(folder, scheme, layers[::-1], **told)

    monkeypatch.setattr(cache_job, "write_cache_setup", write_other)
    error = refused(FormatError, model, tmp_path / "out", recipe_of())
    assert error.where.endswith("kv_cache_quantization")
    assert error.action.startswith("Nothing was published.")


def test_a_lost_or_changed_file_of_parameters_is_refused(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quantize(model, recipe_of(), output)
    path = output / PARAMS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(FormatError, match="SHA-256"):
        LLM(output)
    path.unlink()
    with pytest.raises(FormatError, match="no such file") as caught:
        LLM(output)
    assert "--kv-cache 4" in caught.value.action
    for bits in ("4", "16"):
        LLM(output, kv_cache=bits)


def test_a_shift_that_does_not_drop_out_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write_model(tiny_model("gemma2-softcaps", head_dim=8), tmp_path / "model")
    result = quantize(folder, recipe_of(key_transform="shift_scale"), tmp_path / "out")
    (note,) = result.record["kv_cache"]["notes"]
    assert note.startswith("kv_cache.key_transform: keys are scaled and not shifted, since this model caps")
    assert note in result.warnings
    LLM(tmp_path / "out")


def test_calibration_that_loses_to_plain_rounding_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate = cache_job.calibrate_cache

    def lose(*arguments: Any, **options: Any) -> CalibratedCache:
        found = calibrate(*arguments, **options)
        return CalibratedCache(scheme=found.scheme, layers=found.layers, record={**found.record, "is_plain": True})

    monkeypatch.setattr(cache_job, "calibrate_cache", lose)
    result = quantize(model, recipe_of(), tmp_path / "out")
    assert "kv cache: rounded to the nearest, since calibration lost more on held-out windows" in result.warnings


def test_weights_that_are_not_finite_are_named(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(model, folder)
    info = CheckpointFolder.open(folder).info("model.layers.0.self_attn.k_proj.weight")
    with (folder / info.file).open("r+b") as stream:
        stream.seek(info.begin)
        stream.write(struct.pack("<f", float("nan")))
    # Without calibration nothing is computed, and the copy alone must notice.
    for is_calibrated in (True, False):
        error = refused(ModelError, folder, tmp_path / "out", recipe_of(calibrated=is_calibrated))
        assert error.where.endswith(info.name)


def test_scales_that_split_a_rotary_pair_are_not_published(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate = cache_job.calibrate_cache

    def untie(*arguments: Any, **options: Any) -> CalibratedCache:
        found = calibrate(*arguments, **options)
        keys = found.layers[0].keys
        scale_KD = torch.ones(2, 8)
        scale_KD[0, 0] = 2.0
        layers = (replace(found.layers[0], keys=replace(keys, scale_KD=scale_KD)), *found.layers[1:])
        return replace(found, layers=layers)

    monkeypatch.setattr(cache_job, "calibrate_cache", untie)
    error = refused(FormatError, model, tmp_path / "out", recipe_of(key_transform="shift_scale"))
    assert "layer" in error.where or "layers.0" in error.found
