"""Which format a folder is in, and refusals of what is not read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import STORY_LLAMA, write_tensors

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import ExitCode, FormatError, UsageError
from optgptq.formats import FORMATS, READ_ONLY_FORMATS, detect, format_named


def test_names() -> None:
    assert list(FORMATS) == ["gptq", "gptq_v2", "compressed-tensors", "optgptq"]
    assert all(form.name == name for name, form in FORMATS.items())
    assert [form.smallest_zero_point for form in FORMATS.values()] == [1, 0, 0, 0]
    assert [form.stores_symmetric_zero_points for form in FORMATS.values()] == [True, True, False, False]
    assert [form.holds_binary_codes for form in FORMATS.values()] == [False, False, False, True]
    with pytest.raises(UsageError, match="one of gptq, gptq_v2, compressed-tensors, optgptq, found 'awq'"):
        format_named("awq")
    assert list(READ_ONLY_FORMATS) == ["lut-gemm", "anybcq", "bpdq"]
    for name in READ_ONLY_FORMATS:
        with pytest.raises(UsageError, match=f"found '{name}', which is only read"):
            format_named(name)


def test_dense() -> None:
    assert detect(CheckpointFolder.open(STORY_LLAMA)) is None


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "gptq"}, "gptq"),
        ({"quant_method": "gptq", "format": "GPTQ_V2"}, "gptq_v2"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "compressed_tensors"}, "compressed-tensors"),
        ({"quant_method": "optgptq"}, "optgptq"),
    ],
)
def test_labels(tmp_path: Path, config: dict[str, str], name: str) -> None:
    assert detect(write_tensors(tmp_path, {"a": torch.ones(1)}, {"quantization_config": config})) is FORMATS[name]


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq, marlin"),
        ({"bits": 4}, "no quant_method"),
        ([4], "no quant_method"),
    ],
)
def test_other_methods_are_refused(tmp_path: Path, config: object, found: str) -> None:
    folder = write_tensors(tmp_path, {"a": torch.ones(1)}, {"quantization_config": config})
    with pytest.raises(FormatError) as caught:
        detect(folder)
    assert caught.value.found == found
    assert caught.value.exit_code == ExitCode.INPUT


@pytest.mark.parametrize("suffix", ["qweight", "weight_packed", "bcq_planes"])
def test_packed_tensors_without_configuration_are_refused(tmp_path: Path, suffix: str) -> None:
    folder = write_tensors(tmp_path, {f"a.{suffix}": torch.ones(1, dtype=torch.int32)}, {})
    with pytest.raises(FormatError, match="no quant_method"):
        detect(folder)
