"""The configuration of sign planes: its words, settings per linear, and everything that is not version 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.binary_weights import plane_layout
from support.checkpoints import write_tensors

from optgptq.errors import ExitCode, FormatError, TargetError
from optgptq.formats.planes_config import PlanesConfig, PlaneSettings, planes_config, read_planes_config

GOLDEN = {
    "quant_method": "optgptq",
    "format": "bcq",
    "version": 1,
    "code": "pm1",
    "packing": "k32",
    "bits": 3,
    "group_size": 32,
    "coefficients": "float",
    "dense": [],
}


def read(folder: Path, config: object) -> PlanesConfig:
    return read_planes_config(write_tensors(folder, {"a": torch.ones(1)}, {"quantization_config": config}))


def test_golden_words() -> None:
    assert planes_config([plane_layout()]) == GOLDEN


def test_linears_that_differ_and_dense_ones_are_named(tmp_path: Path) -> None:
    layouts = [plane_layout(name=f"layers.{number}.up") for number in range(3)]
    layouts.append(plane_layout(name="a", bits=2, coefficients="int8"))
    layouts.append(plane_layout(name="b", columns=45, group_size=45))
    layouts.append(plane_layout(name="c", columns=64, group_size=64))
    layouts.append(plane_layout(name="d", columns=64, group_size=-1))
    layouts.append(replace(plane_layout(name="lm_head"), bits=None, coefficients=None))
    config = planes_config(layouts)
    assert config["linears"] == {
        "a": {"bits": 2, "coefficients": "int8"},
        "b": {"group_size": 45, "in_features": 45},
        "c": {"group_size": 64},
        "d": {"group_size": -1},
    }
    assert config["dense"] == ["lm_head"]
    found = read(tmp_path, config)
    assert found.settings_for("layers.1.up") == PlaneSettings(3, 32, "float")
    assert found.settings_for("a") == PlaneSettings(2, 32, "int8")
    assert found.settings_for("b") == PlaneSettings(3, 45, "float", 45)
    assert found.dense == ("lm_head",)


def test_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(TargetError, match="at least one quantized linear"):
        planes_config([replace(plane_layout(), bits=None, coefficients=None)])


@pytest.mark.parametrize("version", [2, 0, "1", None, True, 1.5])
def test_other_versions_are_refused_before_anything_else(tmp_path: Path, version: object) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path, {"version": version, "strange": 1})
    assert caught.value.where.endswith("quantization_config.version")
    assert (caught.value.expected, caught.value.found) == ("1", repr(version))
    assert "with a newer one" in caught.value.action


@pytest.mark.parametrize(
    ("change", "where", "expected"),
    [
        ({"format": "lut"}, "format", "'bcq'"),
        ({"code": "01"}, "code", "'pm1'"),
        ({"packing": "n32"}, "packing", "'k32'"),
        ({"bits": 5}, "bits", "1 to 4"),
        ({"bits": True}, "bits", "1 to 4"),
        ({"bits": None}, "bits", "1 to 4"),
        ({"group_size": 0}, "group_size", "-1 or a positive integer"),
        ({"group_size": "128"}, "group_size", "-1 or a positive integer"),
        ({"coefficients": "int4"}, "coefficients", "one of float, int8, steps"),
        ({"coefficients": []}, "coefficients", "one of float, int8, steps"),
        ({"linears": []}, "linears", "a table from names of linears to their settings"),
        ({"linears": {"a": 3}}, "linears", "a table from names of linears to their settings"),
        ({"linears": {"a": {"bits": 9}}}, "linears.a.bits", "1 to 4"),
        ({"linears": {"a": {"in_features": 0}}}, "linears.a.in_features", "a positive integer"),
        ({"linears": {"a": {"in_features": None}}}, "linears.a.in_features", "a positive integer"),
        ({"linears": {"a": {"sym": True}}}, "linears.a", "keys among bits, group_size, coefficients, in_features"),
        ({"dense": "lm_head"}, "dense", "a list of names of linears"),
        ({"dense": [1]}, "dense", "a list of names of linears"),
    ],
)
def test_values_that_are_not_known(tmp_path: Path, change: dict[str, Any], where: str, expected: str) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path, {**GOLDEN, **change})
    assert caught.value.where.endswith(f"quantization_config.{where}")
    assert caught.value.expected == expected
    assert caught.value.exit_code == ExitCode.INPUT


def test_keys_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="found alpha_dtype, sym") as caught:
        read(tmp_path, {**GOLDEN, "sym": False, "alpha_dtype": "float16"})
    assert "keys among quant_method, format, version" in caught.value.expected


def test_not_an_object(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="expected an object"):
        read(tmp_path, [1])
