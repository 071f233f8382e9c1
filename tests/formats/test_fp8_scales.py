"""Scales for the fp8 cache of other engines: names, shapes, numbers, and that the library takes the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from support.checkpoints import STORY_LLAMA, quantize_all, story_layouts, write_checkpoint, write_tensors

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import ModelError, NumericalError, TargetError
from optgptq.formats.dense import require_dense
from optgptq.formats.fp8_scales import (
    Fp8Summary,
    Strategy,
    add_fp8_scheme,
    check_fp8_scales,
    fp8_entries,
    fp8_scheme,
    fp8_summary,
    fp8_tensors,
    stored_scheme,
)
from optgptq.formats.verify import verify_folder

MODULES = ("model.layers.0.self_attn", "model.layers.1.self_attn")
KEYS = [torch.tensor([4.48, 44.8]), torch.tensor([0.0, 1.0])]
VALUES = [torch.tensor([896.0, 1.0]), torch.tensor([0.0, 0.0])]


def compressed(folder: Path) -> CheckpointFolder:
    source, layouts = CheckpointFolder.open(STORY_LLAMA), story_layouts()
    weights = quantize_all(source, layouts, format_name="compressed-tensors")
    return write_checkpoint(source, folder, layouts, weights, format_name="compressed-tensors")


@pytest.mark.parametrize(
    ("strategy", "shape", "keys", "values"),
    [
        ("tensor", (1,), [[0.1], [1 / 448]], [[2.0], [1.0]]),
        ("attn_head", (2, 1, 1), [[0.01, 0.1], [1.0, 1 / 448]], [[2.0, 1 / 448], [1.0, 1.0]]),
    ],
)
def test_scales_are_maxima_over_448(
    strategy: Strategy, shape: tuple[int, ...], keys: list[list[float]], values: list[list[float]]
) -> None:
    entries = fp8_entries(MODULES, strategy=strategy, num_kv_heads=2)
    tensors = fp8_tensors(MODULES, KEYS, VALUES, strategy=strategy)
    assert [entry.name for entry in entries] == list(tensors)
    assert list(tensors) == [f"{module}.{leaf}" for module in MODULES for leaf in ("k_scale", "v_scale")]
    for entry in entries:
        assert (entry.dtype, entry.shape) == (torch.float32, shape)
        assert (tensors[entry.name].dtype, tuple(tensors[entry.name].shape)) == (entry.dtype, entry.shape)
    for module, key, value in zip(MODULES, keys, values, strict=True):
        assert tensors[f"{module}.k_scale"].flatten().tolist() == pytest.approx(key)
        assert tensors[f"{module}.v_scale"].flatten().tolist() == pytest.approx(value)


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.self_attn\.v_scale: .*found \[nan"):
        fp8_tensors(MODULES, KEYS, [torch.tensor([torch.nan, 1.0]), VALUES[1]], strategy="tensor")


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_the_library_takes_the_configuration(tmp_path: Path, strategy: Strategy) -> None:
    folder = compressed(tmp_path / "out")
    before = folder.config["quantization_config"]
    add_fp8_scheme(folder.path, fp8_scheme(strategy))
    config = CheckpointFolder.open(folder.path).config
    assert config == {**folder.config, "quantization_config": {**before, "kv_cache_scheme": fp8_scheme(strategy)}}
    scheme = QuantizationConfig.model_validate(config["quantization_config"]).kv_cache_scheme
    assert scheme is not None
    assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", strategy)
    assert (scheme.dynamic, scheme.symmetric) == (False, True)
    assert stored_scheme(CheckpointFolder.open(folder.path)) == fp8_scheme(strategy)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    source, layouts = CheckpointFolder.open(STORY_LLAMA), story_layouts()
    weights = quantize_all(source, layouts, format_name="gptq")
    folder = write_checkpoint(source, tmp_path / "out", layouts, weights, format_name="gptq")
    text = (folder.path / "config.json").read_bytes()
    with pytest.raises(TargetError, match=r"quant_method compressed-tensors.*found gptq.*export\.format"):
        add_fp8_scheme(folder.path, fp8_scheme("tensor"))
    assert (folder.path / "config.json").read_bytes() == text


def test_what_is_stored_is_found_again(tmp_path: Path) -> None:
    assert fp8_summary(CheckpointFolder.open(STORY_LLAMA)) is None
    tensors = fp8_tensors(MODULES, KEYS, VALUES, strategy="tensor")
    # A linear whose scale ends alike is no attention module.
    tensors |= {"a.weight": torch.ones(1), "a.k_scale": torch.ones(1)}
    folder = write_tensors(tmp_path / "model", tensors, {"quantization_config": {"kv_cache_scheme": None}})
    assert fp8_summary(folder) == Fp8Summary(strategy="", num_layers=2)
    config = {"quantization_config": {"kv_cache_scheme": fp8_scheme("tensor")}}
    folder = write_tensors(tmp_path / "scheme", {"a.weight": torch.ones(1)}, config)
    assert fp8_summary(folder) == Fp8Summary(strategy="tensor", num_layers=0)


@pytest.mark.parametrize("value", [0.0, -0.5, torch.inf, torch.nan])
def test_scales_that_nobody_can_divide_by_are_problems(tmp_path: Path, value: float) -> None:
    tensors = fp8_tensors(MODULES, KEYS, VALUES, strategy="attn_head")
    folder = write_tensors(tmp_path / "sound", tensors, {})
    assert check_fp8_scales(folder) == []
    assert verify_folder(folder).problems == ()
    name = f"{MODULES[1]}.k_scale"
    tensors[name][1] = value
    folder = write_tensors(tmp_path / "bad", tensors, {})
    assert [problem.where for problem in check_fp8_scales(folder)] == [f"tensor {name}"]
    assert f"tensor {name}" in {problem.where for problem in verify_folder(folder).problems}


def test_new_weights_do_not_inherit_old_scales(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 2)}
    require_dense(write_tensors(tmp_path / "dense", tensors, {}))
    tensors |= fp8_tensors(MODULES, KEYS, VALUES, strategy="tensor")
    with pytest.raises(ModelError, match="found scales of an fp8 KV cache beside them"):
        require_dense(write_tensors(tmp_path / "scaled", tensors, {}))
