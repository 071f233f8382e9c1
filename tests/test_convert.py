"""Change of layout without loss, and refusals that leave nothing behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.binary_weights import STORAGES, plane_layout, random_binary, same_binary
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

from optgptq.binary_weight import BinaryWeight
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import read_manifest, write_manifest
from optgptq.convert import convert
from optgptq.errors import ExitCode, FormatError, OutputError, TargetError, UsageError
from optgptq.formats import FORMATS, READ_ONLY_FORMATS, detect
from optgptq.formats.verify import verify_folder, verify_written, weight_digest
from optgptq.layout import CoefficientStorage, LinearLayout
from optgptq.packing.planes import pack_planes

UNIFORM = ("gptq", "gptq_v2", "compressed-tensors")
LAYOUT = LinearLayout(name="model.layers.0.a", out_features=32, in_features=64, bits=4, group_size=32, symmetric=False)


@pytest.mark.parametrize("target", UNIFORM)
@pytest.mark.parametrize("origin", UNIFORM)
@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(story_layouts(), id="symmetric"),
        pytest.param(story_layouts(bits=3, symmetric=False), id="asymmetric"),
        pytest.param(mixed_story_layouts(), id="mixed"),
    ],
)
def test_between_all_uniform_formats(tmp_path: Path, origin: str, target: str, layouts: list[LinearLayout]) -> None:
    source = CheckpointFolder.open(STORY_LLAMA)
    weights = quantize_all(source, layouts, format_name=origin)
    first = write_checkpoint(source, tmp_path / "first", layouts, weights, format_name=origin)
    result = convert(first.path, tmp_path / "second", to=target)
    assert (result.source_format, result.format, result.num_quantized) == (origin, target, len(weights))
    second = CheckpointFolder.open(tmp_path / "second")
    assert detect(second) is FORMATS[target]
    verify_written(second, source, layouts, {name: weight_digest(weight) for name, weight in weights.items()})
    assert verify_folder(second).problems == ()
    assert ("quantize_config.json" in second.side_files) is (target != "compressed-tensors")


def test_there_and_back_gives_the_same_words(tmp_path: Path) -> None:
    source = CheckpointFolder.open(STORY_LLAMA)
    layouts = mixed_story_layouts()
    weights = quantize_all(source, layouts, format_name="gptq")
    write_checkpoint(source, tmp_path / "first", layouts, weights, format_name="gptq")
    convert(tmp_path / "first", tmp_path / "second", to="compressed-tensors")
    convert(tmp_path / "second", tmp_path / "third", to="gptq")
    for name in ("model.safetensors", "model.safetensors.index.json", "quantize_config.json"):
        assert (tmp_path / "third" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "third")]
    assert configs[0] == configs[1]


def foreign(folder: Path, *, format_name: str = "gptq_v2", zero: int = 3, scale: float = 0.5, **extra: object) -> Path:
    weight = random_weight(LAYOUT, scale_dtype=FORMATS[format_name].scale_dtype(torch.float16))
    weight.zero_point_OG[0, 0] = zero
    weight.scale_OG[0, 0] = scale
    replaced = {key: value for key, value in extra.items() if isinstance(value, torch.Tensor)}
    replaced["model.norm.weight"] = torch.ones(8, dtype=torch.bfloat16)
    write_linears(folder, [LAYOUT], {LAYOUT.name: weight}, format_name=format_name, replaced=replaced)
    return folder


def refused(source: Path, output: Path, *, to: str) -> TargetError:
    with pytest.raises(TargetError) as caught:
        convert(source, output, to=to)
    assert caught.value.exit_code == ExitCode.TARGET
    assert [path.name for path in output.parent.iterdir()] == [source.name]
    return caught.value


def test_zero_point_of_zero_does_not_fit_version_1(tmp_path: Path) -> None:
    error = refused(foreign(tmp_path / "in", zero=0), tmp_path / "out", to="gptq")
    assert error.expected.startswith("zero points from 1 to 15")
    assert "gptq_v2 or compressed-tensors" in error.action
    convert(tmp_path / "in", tmp_path / "out", to="compressed-tensors")


def test_act_order_is_refused(tmp_path: Path) -> None:
    index_I = torch.arange(64, dtype=torch.int32).flip(0) // 32
    source = foreign(tmp_path / "in", format_name="gptq", **{f"{LAYOUT.name}.g_idx": index_I})
    for to in UNIFORM:
        assert "act-order" in refused(source, tmp_path / "out", to=to).found


def test_scales_that_the_dtype_of_the_model_would_round_stay_as_they_are(tmp_path: Path) -> None:
    scale = 1 + 2**-10
    result = convert(foreign(tmp_path / "in", scale=scale), tmp_path / "out", to="compressed-tensors")
    written = CheckpointFolder.open(tmp_path / "out")
    stored = written.read(f"{LAYOUT.name}.weight_scale")
    assert stored.dtype == torch.float16
    assert float(stored[0, 0]) == scale
    assert any("torch.bfloat16 would round them" in warning for warning in result.warnings)
    exact = convert(foreign(tmp_path / "exact"), tmp_path / "out2", to="compressed-tensors")
    assert CheckpointFolder.open(exact.output).read(f"{LAYOUT.name}.weight_scale").dtype == torch.bfloat16


def test_scales_that_float16_would_round_are_refused(tmp_path: Path) -> None:
    weight = random_weight(LAYOUT, scale_dtype=torch.bfloat16)
    weight.scale_OG[0, 0] = 1e-6
    write_linears(tmp_path / "in", [LAYOUT], {LAYOUT.name: weight}, format_name="compressed-tensors")
    assert "exact in torch.float16" in refused(tmp_path / "in", tmp_path / "out", to="gptq").expected


def test_mislabelled_file_is_repaired(tmp_path: Path) -> None:
    layout = replace(LAYOUT, symmetric=True)
    label = {"format": "gptq", "checkpoint_format": "gptq"}
    weight = random_weight(layout)
    write_linears(tmp_path / "in", [layout], {layout.name: weight}, format_name="gptq_v2", config=label)
    result = convert(tmp_path / "in", tmp_path / "out", to="gptq")
    assert any("labelled version 1" in warning for warning in result.warnings)
    written = CheckpointFolder.open(tmp_path / "out")
    assert set(written.read(f"{layout.name}.qzeros").reshape(-1).tolist()) == {0x77777777}
    assert verify_folder(written).notes == ()


def test_manifest_carries_the_origin_and_the_new_files(tmp_path: Path) -> None:
    source = foreign(tmp_path / "in")
    write_manifest(source, {"recipe": {"name": "w4"}})
    convert(source, tmp_path / "out", to="compressed-tensors")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest["recipe"] == {"name": "w4"}
    assert manifest["converted"]["from"] == "gptq_v2"
    assert "model.safetensors" in manifest["converted"]["files"]
    assert set(manifest["files"]) == {"config.json", "model.safetensors", "model.safetensors.index.json"}
    assert verify_folder(CheckpointFolder.open(tmp_path / "out")).problems == ()


def test_dense_source_unknown_format_and_taken_output(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="optgptq quantize MODEL"):
        convert(STORY_LLAMA, tmp_path / "out", to="gptq")
    with pytest.raises(UsageError):
        convert(STORY_LLAMA, tmp_path / "out", to="awq")
    source = foreign(tmp_path / "in")
    with pytest.raises(OutputError, match="apart from the source"):
        convert(source, source / "out", to="gptq_v2")
    convert(source, tmp_path / "out", to="gptq_v2")
    with pytest.raises(OutputError, match="--overwrite"):
        convert(source, tmp_path / "out", to="compressed-tensors")
    convert(source, tmp_path / "out", to="compressed-tensors", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("origin", UNIFORM)
@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(story_layouts(), id="symmetric"),
        pytest.param(story_layouts(bits=3, symmetric=False), id="asymmetric"),
        pytest.param(story_layouts(bits=2, group_size=-1), id="rows"),
        # The bundled model's hidden size: one group is a whole row in all linears but one of a layer.
        pytest.param(story_layouts(group_size=128), id="groups-of-a-row"),
    ],
)
def test_uniform_grids_as_sign_planes_and_back(tmp_path: Path, origin: str, layouts: list[LinearLayout]) -> None:
    source = CheckpointFolder.open(STORY_LLAMA)
    weights = quantize_all(source, layouts, format_name=origin)
    first = write_checkpoint(source, tmp_path / "first", layouts, weights, format_name=origin)
    result = convert(first.path, tmp_path / "second", to="optgptq")
    assert (result.source_format, result.format, result.num_quantized) == (origin, "optgptq", 42)
    assert any("only optgptq reads this layout" in warning for warning in result.warnings)
    second = CheckpointFolder.open(tmp_path / "second")
    form = FORMATS["optgptq"]
    assert detect(second) is form
    assert verify_folder(second).problems == ()
    for layout in form.read_layouts(second):
        if layout.bits is not None:
            assert layout.coefficients == "float"
            assert torch.equal(form.decode(second, layout).dequantize(), weights[layout.name].dequantize())
    assert "quantize_config.json" not in second.side_files
    back = convert(second.path, tmp_path / "third", to=origin)
    for name in ("model.safetensors", "config.json"):
        assert (back.output / name).read_bytes() == (first.path / name).read_bytes()
    scale_dtype = weights[layouts[0].name].scale_dtype
    assert set(back.warnings) == set(FORMATS[origin].check(layouts, scale_dtype=scale_dtype))


def test_coefficients_are_float16_where_that_is_exact(tmp_path: Path) -> None:
    layout = replace(LAYOUT, symmetric=True)
    write_linears(tmp_path / "exact", [layout], {layout.name: random_weight(layout)}, format_name="gptq")
    result = convert(tmp_path / "exact", tmp_path / "first", to="optgptq")
    stored = CheckpointFolder.open(result.output)
    assert {stored.read(f"{LAYOUT.name}.{suffix}").dtype for suffix in ("bcq_alpha", "bcq_offset")} == {torch.float16}
    assert not any("would round" in warning for warning in result.warnings)
    # 11 bits of a scale times an odd number of halves do not fit.
    result = convert(foreign(tmp_path / "fine", scale=1 + 2**-10), tmp_path / "second", to="optgptq")
    offset_GO = CheckpointFolder.open(result.output).read(f"{LAYOUT.name}.bcq_offset")
    assert offset_GO.dtype == torch.float32
    assert float(offset_GO[0, 0]) == (1 + 2**-10) * (15 / 2 - 3)
    assert any("stored in torch.float32: torch.float16 would round them" in warning for warning in result.warnings)
    back = convert(result.output, tmp_path / "third", to="gptq_v2")
    assert float(CheckpointFolder.open(back.output).read(f"{LAYOUT.name}.scales")[0, 0]) == 1 + 2**-10


def test_act_order_becomes_a_column_order_and_comes_back_refused(tmp_path: Path) -> None:
    index_I = torch.arange(64, dtype=torch.int32) % 2
    source = foreign(tmp_path / "in", format_name="gptq", **{f"{LAYOUT.name}.g_idx": index_I})
    before = FORMATS["gptq"].decode(CheckpointFolder.open(source), LAYOUT).dequantize()
    convert(source, tmp_path / "out", to="optgptq")
    written = CheckpointFolder.open(tmp_path / "out")
    assert written.read(f"{LAYOUT.name}.bcq_perm").tolist() == [*range(0, 64, 2), *range(1, 64, 2)]
    (layout,) = FORMATS["optgptq"].read_layouts(written)
    assert torch.equal(FORMATS["optgptq"].decode(written, layout).dequantize(), before)
    with pytest.raises(TargetError, match="act-order"):
        convert(tmp_path / "out", tmp_path / "back", to="gptq")


@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (4, 16)])
def test_widths_and_groups_that_planes_do_not_have(tmp_path: Path, bits: int, group_size: int) -> None:
    layout = replace(LAYOUT, bits=bits, group_size=group_size)
    write_linears(tmp_path / "in", [layout], {layout.name: random_weight(layout)}, format_name="gptq_v2")
    error = refused(tmp_path / "in", tmp_path / "out", to="optgptq")
    assert error.where == LAYOUT.name
    assert error.found == str(bits if bits == 8 else group_size)


@pytest.mark.parametrize("storage", STORAGES)
def test_sign_planes_that_are_no_uniform_grid_stay_sign_planes(tmp_path: Path, storage: CoefficientStorage) -> None:
    layout = plane_layout(rows=32, columns=128, coefficients=storage)
    weight = random_binary(layout, ordered=True)
    write_linears(tmp_path / "in", [layout], {layout.name: weight}, format_name="optgptq")  # type: ignore[dict-item]
    for to in UNIFORM:
        assert "coefficients of other ratios" in refused(tmp_path / "in", tmp_path / "out", to=to).found
    convert(tmp_path / "in", tmp_path / "out", to="optgptq")
    written = CheckpointFolder.open(tmp_path / "out")
    (found,) = FORMATS["optgptq"].read_layouts(written)
    decoded = FORMATS["optgptq"].decode(written, found)
    assert isinstance(decoded, BinaryWeight)
    assert same_binary(decoded, weight)


def test_planes_of_other_projects_are_imported(tmp_path: Path) -> None:
    codes_OI = torch.randint(0, 8, (32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    planes_WPO, alpha_GPO = pack_planes(codes_OI, 3), torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    tensors = {
        "lut-gemm": {"binary": planes_WPO, "alpha": alpha_GPO[:, :3].half(), "q_bias": alpha_GPO[:, 3].half()},
        "anybcq": {"qweight": planes_WPO, "alpha_3": alpha_GPO[:, :3].half(), "beta_3": alpha_GPO[:, 3].half()},
        "bpdq": {"B": planes_WPO, "c": alpha_GPO.bfloat16()},
    }
    assert tensors.keys() == READ_ONLY_FORMATS.keys()
    for name, parts in tensors.items():
        named = {f"{LAYOUT.name}.{suffix}": tensor for suffix, tensor in parts.items()}
        source = write_tensors(tmp_path / name, {**named, f"{LAYOUT.name}.bias": torch.ones(32).half()}, {})
        (layout,) = READ_ONLY_FORMATS[name].read_layouts(source)
        before = READ_ONLY_FORMATS[name].decode(source, layout)
        result = convert(source.path, tmp_path / f"{name}-out", to="optgptq")
        assert (result.source_format, result.num_quantized) == (name, 1)
        written = CheckpointFolder.open(result.output)
        assert weight_digest(FORMATS["optgptq"].decode(written, layout)) == weight_digest(before)
        assert verify_folder(written).problems == ()
        assert f"{LAYOUT.name}.bias" in written.tensors
        with pytest.raises(UsageError, match="which is only read"):
            convert(source.path, tmp_path / "never", to=name)
        assert "coefficients of other ratios" in _refusal(source.path, tmp_path / "never").found


def _refusal(source: Path, output: Path) -> TargetError:
    with pytest.raises(TargetError) as caught:
        convert(source, output, to="gptq")
    return caught.value
