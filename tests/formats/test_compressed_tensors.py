"""compressed-tensors files: the words of GPTQ transposed, decoded alike by the library, and old packings."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import mixed_story_layouts, random_weight, same_weight, story_layouts, write_linears

from optgptq.errors import FormatError, TargetError
from optgptq.formats import detect
from optgptq.formats.compressed_tensors import COMPRESSED_TENSORS
from optgptq.formats.gptq import GPTQ_V2
from optgptq.layout import LinearLayout

NAME = "model.layers.0.mlp.down_proj"


def layout_of(
    *, rows: int = 34, columns: int = 96, bits: int = 4, group_size: int = 32, symmetric: bool = True
) -> LinearLayout:
    return LinearLayout(
        name=NAME, out_features=rows, in_features=columns, bits=bits, group_size=group_size, symmetric=symmetric
    )


def old_pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The packing of compressed-tensors before 0.18: no code crosses a word."""
    per_word = 32 // bits
    rows = []
    for row in codes.tolist():
        words = [row[begin : begin + per_word] for begin in range(0, len(row), per_word)]
        packed = [sum(code << (place * bits) for place, code in enumerate(word)) for word in words]
        rows.append([word - 2**32 if word >= 2**31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_gptq_transposed(bits: int) -> None:
    layout = layout_of(bits=bits, symmetric=False)
    weight = random_weight(layout)
    ours, gptq = COMPRESSED_TENSORS.encode(layout, weight), GPTQ_V2.encode(layout, weight)
    assert torch.equal(ours[f"{NAME}.weight_packed"], gptq[f"{NAME}.qweight"].t())
    assert torch.equal(ours[f"{NAME}.weight_zero_point"], gptq[f"{NAME}.qzeros"].t())
    assert torch.equal(ours[f"{NAME}.weight_scale"], gptq[f"{NAME}.scales"].t())
    assert ours[f"{NAME}.weight_shape"].tolist() == [34, 96]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_library_decodes_the_same_weight(bits: int, group_size: int, symmetric: bool) -> None:
    layout = layout_of(bits=bits, group_size=group_size, symmetric=symmetric)
    weight = random_weight(layout, scale_dtype=torch.float32)
    config = COMPRESSED_TENSORS.quantization_config([layout])
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    stored = COMPRESSED_TENSORS.encode(layout, weight)
    state = {name.removeprefix(f"{NAME}."): tensor for name, tensor in stored.items()}
    decoded = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(decoded, weight.dequantize())


@settings(deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([-1, 16, 33, 64]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_round_trip(
    bits: int, rows: int, groups: int, group_size: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    columns = groups * (100 if group_size == -1 else group_size)
    layout = layout_of(rows=rows, columns=columns, bits=bits, group_size=group_size, symmetric=symmetric)
    weight = random_weight(layout, seed=seed, scale_dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_linears(Path(folder), [layout], {NAME: weight}, format_name="compressed-tensors")
        (found,) = COMPRESSED_TENSORS.read_layouts(checkpoint)
        assert same_weight(COMPRESSED_TENSORS.decode(checkpoint, found), weight)
        assert COMPRESSED_TENSORS.notes(checkpoint, found) == ()


@pytest.mark.parametrize("symmetric", [True, False])
def test_entries_are_the_encoded_tensors(symmetric: bool) -> None:
    layout = layout_of(bits=3, symmetric=symmetric)
    tensors = COMPRESSED_TENSORS.encode(layout, random_weight(layout, scale_dtype=torch.bfloat16))
    entries = COMPRESSED_TENSORS.entries(layout, dense_dtype=torch.bfloat16)
    assert {entry.name: (entry.dtype, entry.shape) for entry in entries} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert (f"{NAME}.weight_zero_point" in tensors) is not symmetric


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packing_from_before_0_18_is_told_by_its_shape(tmp_path: Path, bits: int, symmetric: bool) -> None:
    layout = layout_of(rows=64, bits=bits, symmetric=symmetric)
    weight = random_weight(layout)
    replaced = {f"{NAME}.weight_packed": old_pack(weight.codes_OI, bits)}
    if not symmetric:
        replaced[f"{NAME}.weight_zero_point"] = old_pack(weight.zero_point_OG.t(), bits).t().contiguous()
    checkpoint = write_linears(tmp_path, [layout], {NAME: weight}, format_name="compressed-tensors", replaced=replaced)
    (found,) = COMPRESSED_TENSORS.read_layouts(checkpoint)
    assert same_weight(COMPRESSED_TENSORS.decode(checkpoint, found), weight)
    assert "before 0.18" in COMPRESSED_TENSORS.notes(checkpoint, found)[0]


def test_unpacked_signed_zero_points_of_old_files(tmp_path: Path) -> None:
    layout = layout_of(symmetric=False)
    weight = random_weight(layout)
    replaced = {f"{NAME}.weight_zero_point": (weight.zero_point_OG - 8).to(torch.int8)}
    checkpoint = write_linears(tmp_path, [layout], {NAME: weight}, format_name="compressed-tensors", replaced=replaced)
    assert same_weight(COMPRESSED_TENSORS.decode(checkpoint, layout), weight)


@pytest.mark.parametrize(("index", "kept"), [("unused", False), ("trivial", False), ("shuffled", True)])
def test_group_index(tmp_path: Path, index: str, kept: bool) -> None:
    layout = layout_of()
    trivial_I = torch.arange(96, dtype=torch.int32) // 32
    index_I = {"unused": torch.full_like(trivial_I, -1), "trivial": trivial_I, "shuffled": trivial_I.flip(0)}[index]
    checkpoint = write_linears(
        tmp_path,
        [layout],
        {NAME: random_weight(layout)},
        format_name="compressed-tensors",
        replaced={f"{NAME}.weight_g_idx": index_I},
    )
    decoded = COMPRESSED_TENSORS.decode(checkpoint, layout).group_index_I
    assert (decoded is not None) is kept
    assert decoded is None or torch.equal(decoded, index_I)


def test_uniform_configuration() -> None:
    config = COMPRESSED_TENSORS.quantization_config(story_layouts(group_size=128))
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]
    assert config["version"] == "0.19.0"
    assert config["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    }
    assert QuantizationConfig.model_validate(config).config_groups["group_0"].weights.num_bits == 4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_in_codes_is_named_and_not_ignored(bits: int) -> None:
    """Engines build heads of a class that `Linear` does not match."""
    head = LinearLayout(name="lm_head", out_features=1024, in_features=128, bits=bits, group_size=128)
    config = COMPRESSED_TENSORS.quantization_config([*story_layouts(group_size=128), head])
    assert config["ignore"] == []
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [["Linear", "re:^lm_head$"]] if bits == 4 else ["re:^lm_head$"] in targets
    QuantizationConfig.model_validate(config)


def test_one_group_per_row_is_the_channel_strategy() -> None:
    weights = COMPRESSED_TENSORS.quantization_config([layout_of(group_size=-1)])["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)


def test_mixed_configuration_targets_and_ignores_exactly(tmp_path: Path) -> None:
    layouts = mixed_story_layouts()
    config = COMPRESSED_TENSORS.quantization_config(layouts)
    assert config["ignore"] == ["lm_head", "model.layers.2.mlp.down_proj"]
    QuantizationConfig.model_validate(config)
    weights = {layout.name: random_weight(layout) for layout in layouts if layout.bits is not None}
    checkpoint = write_linears(tmp_path, layouts, weights, format_name="compressed-tensors")
    found = {layout.name: layout for layout in COMPRESSED_TENSORS.read_layouts(checkpoint)}
    for layout in layouts:
        if layout.bits is not None:
            assert (found[layout.name].bits, found[layout.name].group_size) == (layout.bits, layout.group_size)
            assert found[layout.name].fused_name == layout.fused_name


def test_nothing_quantized_is_refused() -> None:
    with pytest.raises(TargetError, match="at least one quantized linear"):
        COMPRESSED_TENSORS.quantization_config([])


def changed(**scheme: object) -> dict[str, Any]:
    config = COMPRESSED_TENSORS.quantization_config([layout_of()])
    group = config["config_groups"]["group_0"]
    weights = {key: scheme.pop(key) for key in list(scheme) if key in ("num_bits", "type", "strategy", "group_size")}
    group["weights"] |= weights
    group |= scheme
    return config


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (changed(format="nvfp4-pack-quantized"), "group_0.format"),
        (changed(type="float"), "group_0.weights.type"),
        (changed(num_bits=9), "group_0.weights.num_bits"),
        (changed(strategy="block"), "group_0.weights.strategy"),
        (changed(group_size=0), "group_0.weights.group_size"),
        (changed(targets="Linear"), "group_0.targets"),
        (changed(input_activations={"num_bits": 8}), "group_0.input_activations"),
        (changed(weights=None), "group_0"),
        ({"config_groups": {}}, "config_groups"),
        (changed(targets=["re:.*other"]), f"config_groups, linear {NAME}"),
        (changed(targets=["re:("]), "target 're:('"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, config: dict[str, Any], where: str) -> None:
    layout = layout_of()
    checkpoint = write_linears(
        tmp_path, [layout], {NAME: random_weight(layout)}, format_name="compressed-tensors", config=config
    )
    assert detect(checkpoint) is COMPRESSED_TENSORS
    with pytest.raises(FormatError) as caught:
        COMPRESSED_TENSORS.read_layouts(checkpoint)
    assert caught.value.where.endswith(where)


@pytest.mark.parametrize(
    ("suffix", "tensor"),
    [
        ("weight_packed", torch.zeros(34, 11, dtype=torch.int32)),
        ("weight_packed", torch.zeros(33, 12, dtype=torch.int32)),
        ("weight_packed", torch.zeros(34, 12, dtype=torch.int64)),
        ("weight_scale", torch.zeros(34, 4)),
        ("weight_shape", torch.tensor([34, 96, 1])),
        ("weight_shape", torch.tensor([34, -96])),
        ("weight_shape", torch.tensor([0, 96])),
        ("weight_zero_point", torch.zeros(6, 3, dtype=torch.int32)),
    ],
)
def test_shapes_that_contradict_each_other(tmp_path: Path, suffix: str, tensor: torch.Tensor) -> None:
    layout = layout_of(symmetric=False)
    checkpoint = write_linears(
        tmp_path,
        [layout],
        {NAME: random_weight(layout)},
        format_name="compressed-tensors",
        replaced={f"{NAME}.{suffix}": tensor},
    )
    with pytest.raises(FormatError) as caught:
        COMPRESSED_TENSORS.decode(checkpoint, COMPRESSED_TENSORS.read_layouts(checkpoint)[0])
    assert f"tensor {NAME}." in caught.value.where
