"""Whole checkpoints: planned tensors, dense ones copied bit for bit, side files, config.json."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import STORY_LLAMA, quantize_all, story_layouts, write_checkpoint, write_tensors

from optgptq.checkpoint.folder import INDEX_FILE, CheckpointFolder
from optgptq.errors import CapacityError, ModelError
from optgptq.formats import FORMATS
from optgptq.formats.checkpoint import config_text, plan_entries, same_config, write_side_files
from optgptq.layout import LinearLayout


def test_plan_keeps_the_order_of_names_and_replaces_weights() -> None:
    source = CheckpointFolder.open(STORY_LLAMA)
    layouts = story_layouts()
    entries = plan_entries(source, layouts, FORMATS["gptq"])
    names = [entry.name for entry in entries]
    assert names == sorted(names)
    assert len(names) == len(source.tensors) + 3 * len(layouts)
    assert "model.layers.0.mlp.down_proj.weight" not in names
    dense = {entry.name: entry for entry in entries}["model.embed_tokens.weight"]
    assert (dense.dtype, dense.shape) == (torch.bfloat16, (1024, 128))


def test_scales_follow_the_dtype_of_the_replaced_weight() -> None:
    source = CheckpointFolder.open(STORY_LLAMA)
    for name, dtype in (("gptq", torch.float16), ("compressed-tensors", torch.bfloat16)):
        entries = plan_entries(source, story_layouts(), FORMATS[name])
        assert {entry.dtype for entry in entries if "scale" in entry.name} == {dtype}


def test_shape_that_differs_from_the_layout_is_refused() -> None:
    source = CheckpointFolder.open(STORY_LLAMA)
    wrong = replace(story_layouts()[0], in_features=64)
    with pytest.raises(ModelError, match=r"expected \[128, 64\], found \[128, 384\]"):
        plan_entries(source, [wrong], FORMATS["gptq"])
    with pytest.raises(ModelError, match="a tensor of that name"):
        plan_entries(source, [replace(wrong, name="model.layers.9.mlp.down_proj")], FORMATS["gptq"])


def test_transposed_weights_of_conv1d(tmp_path: Path) -> None:
    weight_IO = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    source = write_tensors(
        tmp_path / "source", {"h.0.attn.c_attn.weight": weight_IO, "h.0.attn.c_attn.bias": torch.ones(32)}, {}
    )
    layout = LinearLayout(
        name="h.0.attn.c_attn", out_features=32, in_features=64, bits=4, group_size=32, stored_transposed=True
    )
    weights = quantize_all(source, [layout], format_name="gptq")
    written = write_checkpoint(source, tmp_path / "out", [layout], weights, format_name="gptq")
    assert torch.equal(written.read("h.0.attn.c_attn.bias"), torch.ones(32))
    decoded = FORMATS["gptq"].decode(written, layout)
    assert float((decoded.dequantize() - weight_IO.t()).abs().max()) < 0.5


@pytest.mark.parametrize("format_name", ["gptq", "gptq_v2", "compressed-tensors"])
def test_everything_else_is_copied_byte_for_byte(tmp_path: Path, format_name: str) -> None:
    shutil.copytree(STORY_LLAMA, tmp_path / "source")
    (tmp_path / "source" / "sub").mkdir()
    (tmp_path / "source" / "sub" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "source" / "quantize_config.json").write_text('{"stale": true}')
    (tmp_path / "source" / "optgptq_manifest.json").write_text('{"stale": true}')
    source = CheckpointFolder.open(tmp_path / "source")
    layouts = story_layouts(symmetric=False)
    weights = quantize_all(source, layouts, format_name=format_name)
    written = write_checkpoint(
        source, tmp_path / "out", layouts, weights, format_name=format_name, max_shard_bytes=300_000
    )
    assert len(written.weight_files) > 1
    assert (written.path / INDEX_FILE).is_file()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "sub/chat_template.jinja"):
        assert (written.path / name).read_bytes() == (source.path / name).read_bytes()
    for name in source.tensors:
        if "norm" in name or "embed" in name:
            assert torch.equal(written.read(name).view(torch.uint8), source.read(name).view(torch.uint8))
    assert same_config(written, source)
    assert written.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in written.tensors
    assert "optgptq_manifest.json" not in written.side_files
    extra = {"quantize_config.json"} if format_name != "compressed-tensors" else set()
    assert set(written.side_files) - set(source.side_files) == set()
    assert ("quantize_config.json" in written.side_files) is bool(extra)
    if extra:
        stored = json.loads((written.path / "quantize_config.json").read_text())
        assert stored == written.config["quantization_config"]


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    source = CheckpointFolder.open(STORY_LLAMA)
    layouts = story_layouts()
    weights = quantize_all(source, layouts, format_name="gptq")
    for name in ("first", "second"):
        write_checkpoint(source, tmp_path / name, layouts, weights, format_name="gptq")
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_config_keeps_its_bytes_and_gains_one_key() -> None:
    text = '{\n    "eps": 1e-05,  "a": [1,\n2], "nan": NaN,\n    "name": "é"\n}\n'
    result = config_text(text, {"bits": 4})
    assert result.startswith(text.rstrip().removesuffix("}").rstrip() + ",")
    parsed = json.loads(result)
    assert list(parsed) == ["eps", "a", "nan", "name", "quantization_config"]
    assert parsed["quantization_config"] == {"bits": 4}
    assert json.loads(config_text("{}", {"bits": 4})) == {"quantization_config": {"bits": 4}}


def test_config_key_is_replaced_in_its_place() -> None:
    result = json.loads(config_text('{"a": 1, "quantization_config": {"old": 1}, "b": 2}', {"bits": 4}))
    assert list(result.items()) == [("a", 1), ("quantization_config", {"bits": 4}), ("b", 2)]


def test_full_disk_while_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CapacityError, match="No space left on device"):
        write_side_files(CheckpointFolder.open(STORY_LLAMA), tmp_path, FORMATS["gptq"], story_layouts())
