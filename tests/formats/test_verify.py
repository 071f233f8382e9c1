"""What was written is compared with what was meant; any damage is found and named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    STORY_LLAMA,
    mixed_story_layouts,
    quantize_all,
    random_weight,
    story_layouts,
    write_checkpoint,
    write_linears,
    write_tensors,
)

from optgptq.affine_weight import AffineWeight
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import write_manifest
from optgptq.errors import FormatError
from optgptq.formats.verify import verify_folder, verify_written, weight_digest
from optgptq.layout import LinearLayout

LAYOUT = LinearLayout(name="layers.0.a", out_features=32, in_features=64, bits=4, group_size=32, symmetric=False)


def written(output: Path, *, format_name: str = "gptq") -> tuple[CheckpointFolder, dict[str, AffineWeight]]:
    source = CheckpointFolder.open(STORY_LLAMA)
    layouts = mixed_story_layouts()
    weights = quantize_all(source, layouts, format_name=format_name)
    return write_checkpoint(source, output, layouts, weights, format_name=format_name), weights


def verify(folder: Path, weights: dict[str, AffineWeight]) -> None:
    digests = {name: weight_digest(weight) for name, weight in weights.items()}
    verify_written(CheckpointFolder.open(folder), CheckpointFolder.open(STORY_LLAMA), mixed_story_layouts(), digests)


@pytest.mark.parametrize("format_name", ["gptq", "gptq_v2", "compressed-tensors"])
def test_sound_checkpoints_pass(tmp_path: Path, format_name: str) -> None:
    checkpoint, weights = written(tmp_path / "out", format_name=format_name)
    verify(checkpoint.path, weights)
    report = verify_folder(checkpoint)
    assert (report.format, report.num_quantized, report.has_manifest) == (format_name, 41, False)
    assert report.problems == ()
    assert report.notes == ()


def test_digest_changes_with_everything_that_dequantize_depends_on() -> None:
    weight = random_weight(LAYOUT)
    digest = weight_digest(weight)
    codes_OI, scale_OG, zero_OG = weight.codes_OI.clone(), weight.scale_OG.clone(), weight.zero_point_OG.clone()
    codes_OI[0, 0] ^= 1
    scale_OG[0, 0] *= 2
    zero_OG[0, 0] ^= 1
    trivial_I = torch.arange(64, dtype=torch.int32) // 32
    assert weight_digest(replace(weight, group_index_I=trivial_I)) == digest
    assert weight_digest(replace(weight, scale_OG=weight.scale_OG.float())) == digest
    others = [
        replace(weight, codes_OI=codes_OI),
        replace(weight, scale_OG=scale_OG),
        replace(weight, zero_point_OG=zero_OG),
        replace(weight, group_index_I=trivial_I.flip(0)),
    ]
    assert len({digest, *(weight_digest(other) for other in others)}) == 5


def flip_byte(folder: Path, name: str) -> None:
    info = CheckpointFolder.open(folder).info(name)
    with (folder / info.file).open("r+b") as stream:
        stream.seek(info.begin)
        byte = stream.read(1)[0]
        stream.seek(info.begin)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "g_idx"])
def test_one_flipped_bit_in_a_quantized_linear_is_found(tmp_path: Path, name: str) -> None:
    checkpoint, weights = written(tmp_path / "out")
    flip_byte(checkpoint.path, f"model.layers.3.self_attn.q_proj.{name}")
    with pytest.raises(FormatError, match=r"linear model\.layers\.3\.self_attn\.q_proj"):
        verify(checkpoint.path, weights)


def test_one_flipped_bit_in_a_dense_tensor_is_found(tmp_path: Path) -> None:
    checkpoint, weights = written(tmp_path / "out")
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"):
        flip_byte(checkpoint.path, name)
        with pytest.raises(FormatError, match="the bytes of the source"):
            verify(checkpoint.path, weights)
        flip_byte(checkpoint.path, name)
    verify(checkpoint.path, weights)


def edit_config(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "generation_config.json").write_text("{}"), "generation_config.json"),
        (edit_config(lambda config: config.update(tie_word_embeddings=False)), "config.json"),
        (edit_config(lambda config: config.pop("bos_token_id")), "config.json"),
        (edit_config(lambda config: config.pop("quantization_config")), "qweight"),
    ],
)
def test_lost_or_changed_files_are_found(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    checkpoint, weights = written(tmp_path / "out")
    (checkpoint.path / "quantize_config.json").unlink()
    damage(checkpoint.path)
    with pytest.raises(FormatError) as caught:
        verify(checkpoint.path, weights)
    assert message in str(caught.value) or "quantization_config" in caught.value.where


def test_missing_tensor_is_found(tmp_path: Path) -> None:
    checkpoint, weights = written(tmp_path / "out")
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors if name != "model.norm.weight"}
    write_tensors(tmp_path / "less", tensors, checkpoint.config)
    with pytest.raises(FormatError, match="no such tensor"):
        verify(tmp_path / "less", weights)


def test_other_settings_than_planned_are_found(tmp_path: Path) -> None:
    source = CheckpointFolder.open(STORY_LLAMA)
    layouts = story_layouts()
    weights = quantize_all(source, layouts, format_name="gptq")
    checkpoint = write_checkpoint(source, tmp_path / "out", layouts, weights, format_name="gptq")
    digests = {name: weight_digest(weight) for name, weight in weights.items()}
    other = [replace(layout, symmetric=False) for layout in layouts]
    with pytest.raises(FormatError, match="symmetric"):
        verify_written(checkpoint, source, other, digests)
    with pytest.raises(FormatError, match="a quantized checkpoint, found a dense one"):
        verify_written(source, source, layouts, digests)


def test_dense_checkpoint_is_verified_too(tmp_path: Path) -> None:
    report = verify_folder(CheckpointFolder.open(STORY_LLAMA))
    assert (report.format, report.num_tensors, report.num_quantized, report.problems) == ("dense", 56, 0, ())
    weight = torch.ones(2, 3, dtype=torch.bfloat16)
    weight[1, 1] = torch.nan
    report = verify_folder(write_tensors(tmp_path / "nan", {"a.weight": weight, "b": torch.tensor([1])}, {}))
    (problem,) = report.problems
    assert (problem.where, problem.found) == ("tensor a.weight", "1 that are NaN or infinite")


def test_infinite_scales_and_bad_groups_are_problems(tmp_path: Path) -> None:
    weight = random_weight(LAYOUT)
    scales = weight.scale_OG.t().contiguous().clone()
    scales[0, 3] = torch.inf
    checkpoint = write_linears(
        tmp_path / "a", [LAYOUT], {LAYOUT.name: weight}, format_name="gptq", replaced={f"{LAYOUT.name}.scales": scales}
    )
    (problem,) = verify_folder(checkpoint).problems
    assert (problem.where, problem.found) == ("linear layers.0.a, scales", "1 that are NaN or infinite")
    index_I = torch.full((64,), 7, dtype=torch.int32)
    checkpoint = write_linears(
        tmp_path / "b", [LAYOUT], {LAYOUT.name: weight}, format_name="gptq", replaced={f"{LAYOUT.name}.g_idx": index_I}
    )
    (problem,) = verify_folder(checkpoint).problems
    assert problem.expected == "groups from 0 to 1"


def test_notes_and_manifest_of_foreign_files(tmp_path: Path) -> None:
    symmetric = replace(LAYOUT, symmetric=True)
    checkpoint = write_linears(
        tmp_path / "a",
        [symmetric],
        {LAYOUT.name: random_weight(symmetric)},
        format_name="gptq_v2",
        config={"format": "gptq", "checkpoint_format": "gptq"},
    )
    (checkpoint.path / "pytorch_model.bin").write_bytes(b"x")
    report = verify_folder(CheckpointFolder.open(checkpoint.path))
    assert "labelled version 1" in report.notes[0]
    assert report.notes[1] == "not looked at: pytorch_model.bin"


def test_manifest_is_checked(tmp_path: Path) -> None:
    checkpoint, _ = written(tmp_path / "out")
    write_manifest(checkpoint.path, {})
    report = verify_folder(CheckpointFolder.open(checkpoint.path))
    assert report.has_manifest
    assert report.problems == ()
    os.truncate(checkpoint.path / "tokenizer.json", 10)
    (problem,) = verify_folder(CheckpointFolder.open(checkpoint.path)).problems
    assert problem.where == "tokenizer.json"
