"""GPTQ files: golden words of both versions, exact round trips, and foreign files with all their oddities."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import random_weight, same_weight, write_linears, write_tensors

from optgptq.affine_weight import AffineWeight
from optgptq.errors import ExitCode, FormatError, TargetError
from optgptq.formats import FORMATS, detect, format_named
from optgptq.formats.gptq import GPTQ_V1, GPTQ_V2
from optgptq.layout import LinearLayout
from optgptq.packing.words import pack_rows

NAME = "model.layers.0.mlp.down_proj"


def layout_of(
    *, rows: int = 32, columns: int = 64, bits: int = 4, group_size: int = 32, symmetric: bool = True, name: str = NAME
) -> LinearLayout:
    return LinearLayout(
        name=name, out_features=rows, in_features=columns, bits=bits, group_size=group_size, symmetric=symmetric
    )


def read_back(folder: Path, layout: LinearLayout, weight: AffineWeight, *, format_name: str) -> AffineWeight:
    checkpoint = write_linears(folder, [layout], {layout.name: weight}, format_name=format_name)
    (found,) = FORMATS[format_name].read_layouts(checkpoint)
    return FORMATS[format_name].decode(checkpoint, found)


@pytest.mark.parametrize(
    ("bits", "version_1", "version_2"),
    [
        (2, [0x55555555], [0xAAAAAAAA]),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492]),
        (4, [0x77777777], [0x88888888]),
        (8, [0x7F7F7F7F], [0x80808080]),
    ],
)
def test_golden_zero_words_of_symmetric_files(bits: int, version_1: list[int], version_2: list[int]) -> None:
    layout = layout_of(bits=bits)
    weight = random_weight(layout)
    for form, words in ((GPTQ_V1, version_1), (GPTQ_V2, version_2)):
        stored = form.encode(layout, weight)[f"{NAME}.qzeros"]
        row = [word & 0xFFFFFFFF for word in stored[0].tolist()]
        assert row == words * (len(row) // len(words))


def test_golden_words_of_an_asymmetric_weight() -> None:
    layout = layout_of(rows=8, columns=8, group_size=-1, symmetric=False)
    weight = AffineWeight(
        codes_OI=torch.arange(8, dtype=torch.uint8).repeat(8, 1),
        scale_OG=torch.full((8, 1), 0.5, dtype=torch.float16),
        zero_point_OG=torch.arange(1, 9, dtype=torch.int32)[:, None],
        bits=4,
        group_size=8,
        symmetric=False,
    )
    first, second = GPTQ_V1.encode(layout, weight), GPTQ_V2.encode(layout, weight)
    assert [word & 0xFFFFFFFF for word in first[f"{NAME}.qweight"].reshape(-1).tolist()] == [0x76543210] * 8
    assert first[f"{NAME}.qzeros"].tolist() == [[0x76543210]]
    assert [word & 0xFFFFFFFF for word in second[f"{NAME}.qzeros"][0].tolist()] == [0x87654321]
    assert first[f"{NAME}.scales"].tolist() == [[0.5] * 8]
    assert first[f"{NAME}.g_idx"].tolist() == [0] * 8


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_entries_are_the_encoded_tensors(name: str) -> None:
    layout = layout_of(rows=34, columns=96, bits=3, symmetric=False)
    form = format_named(name)
    tensors = form.encode(layout, random_weight(layout))
    entries = form.entries(layout, dense_dtype=torch.bfloat16)
    assert {entry.name: (entry.dtype, entry.shape) for entry in entries} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert tensors[f"{NAME}.qweight"].shape == (9, 34)
    assert tensors[f"{NAME}.qzeros"].shape == (3, 4)
    assert tensors[f"{NAME}.scales"].dtype == torch.float16
    assert tensors[f"{NAME}.g_idx"].tolist() == [0] * 32 + [1] * 32 + [2] * 32


@settings(deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([-1, 16, 33, 64]),
    symmetric=st.booleans(),
    name=st.sampled_from(["gptq", "gptq_v2"]),
    seed=st.integers(0, 1000),
)
def test_round_trip(bits: int, rows: int, groups: int, group_size: int, symmetric: bool, name: str, seed: int) -> None:
    columns = groups * (100 if group_size == -1 else group_size)
    layout = layout_of(rows=rows, columns=columns, bits=bits, group_size=group_size, symmetric=symmetric)
    weight = random_weight(layout, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        assert same_weight(read_back(Path(folder), layout, weight, format_name=name), weight)


def test_version_2_holds_a_zero_point_of_zero(tmp_path: Path) -> None:
    layout = layout_of(symmetric=False)
    weight = random_weight(layout)
    weight.zero_point_OG[3, 1] = 0
    assert same_weight(read_back(tmp_path, layout, weight, format_name="gptq_v2"), weight)


@pytest.mark.parametrize(("form", "bad"), [(GPTQ_V1, 0), (GPTQ_V1, 16), (GPTQ_V2, 16), (GPTQ_V2, -1)])
def test_zero_points_that_the_version_cannot_hold_are_refused(form: object, bad: int) -> None:
    layout = layout_of(symmetric=False)
    weight = random_weight(layout)
    weight.zero_point_OG[3, 1] = bad
    assert form in (GPTQ_V1, GPTQ_V2)
    with pytest.raises(TargetError, match="which the layout can store") as caught:
        (GPTQ_V1 if form is GPTQ_V1 else GPTQ_V2).encode(layout, weight)
    assert caught.value.exit_code == ExitCode.TARGET
    assert "gptq_v2 or compressed-tensors" in caught.value.action


@pytest.mark.parametrize("scale", [1e-9, 70000.0, 1 + 2**-11])
def test_scales_are_never_rounded(scale: float) -> None:
    layout = layout_of()
    weight = random_weight(layout, scale_dtype=torch.float32)
    weight.scale_OG[0, 0] = scale
    with pytest.raises(TargetError, match=f"1 of {weight.scale_OG.numel()} that are not"):
        GPTQ_V1.encode(layout, weight)


def test_non_finite_scales_are_refused() -> None:
    layout = layout_of()
    weight = random_weight(layout)
    weight.scale_OG[0, 0] = torch.nan
    with pytest.raises(FormatError, match="finite scales"):
        GPTQ_V1.encode(layout, weight)


def test_act_order_is_not_written() -> None:
    layout = layout_of()
    weight = replace(random_weight(layout), group_index_I=torch.zeros(64, dtype=torch.int32))
    with pytest.raises(TargetError, match="Quantize the model again"):
        GPTQ_V1.encode(layout, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("written", "label"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_mislabelled_symmetric_files_are_read_by_their_words(
    tmp_path: Path, bits: int, written: str, label: str
) -> None:
    layout = layout_of(rows=40, bits=bits)
    weight = random_weight(layout)
    wrong = {"checkpoint_format": label, "format": label}
    checkpoint = write_linears(tmp_path, [layout], {NAME: weight}, format_name=written, config=wrong)
    form = detect(checkpoint)
    assert form is FORMATS[label]
    (found,) = form.read_layouts(checkpoint)
    assert same_weight(form.decode(checkpoint, found), weight)
    (note,) = form.notes(checkpoint, found)
    assert f"labelled version {FORMATS[label].version}" in note  # type: ignore[attr-defined]


def test_mislabelled_asymmetric_files_are_read_as_labelled(tmp_path: Path) -> None:
    layout = layout_of(symmetric=False)
    weight = random_weight(layout)
    weight.zero_point_OG.fill_(8)
    wrong = {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    checkpoint = write_linears(tmp_path, [layout], {NAME: weight}, format_name="gptq", config=wrong)
    assert GPTQ_V2.decode(checkpoint, layout).zero_point_OG.unique().tolist() == [7]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_that_wrapped_are_read_as_their_writer_meant_them(tmp_path: Path, bits: int) -> None:
    """GPTQModel takes one from every value of a word at once, so a zero point of 0 borrows from its neighbour."""
    layout = layout_of(bits=bits, symmetric=False)
    weight = random_weight(layout)
    weight.zero_point_OG[5] = 0
    zero_GO = weight.zero_point_OG.t().contiguous()
    if bits == 3:
        words = pack_rows((zero_GO - 1) % 8, 3)
    else:
        words = pack_rows(zero_GO, bits) - sum(1 << begin for begin in range(0, 32, bits))
    label = {"checkpoint_format": "gptq", "format": "gptq"}
    checkpoint = write_linears(
        tmp_path, [layout], {NAME: weight}, format_name="gptq_v2", config=label, replaced={f"{NAME}.qzeros": words}
    )
    assert same_weight(GPTQ_V1.decode(checkpoint, layout), weight)
    assert "wrapped below zero" in GPTQ_V1.notes(checkpoint, layout)[0]


def test_act_order_files_are_read(tmp_path: Path) -> None:
    layout = layout_of(symmetric=False)
    weight = random_weight(layout)
    index_I = torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(torch.int32) // 32
    checkpoint = write_linears(
        tmp_path,
        [layout],
        {NAME: weight},
        format_name="gptq",
        config={"desc_act": True},
        replaced={f"{NAME}.g_idx": index_I},
    )
    decoded = GPTQ_V1.decode(checkpoint, layout)
    assert same_weight(decoded, replace(weight, group_index_I=index_I))
    for row in (0, 17, 31):
        for column in (0, 33, 63):
            group = int(index_I[column])
            offset = int(weight.codes_OI[row, column]) - int(weight.zero_point_OG[row, group])
            assert float(decoded.dequantize()[row, column]) == offset * float(weight.scale_OG[row, group])
    assert "act-order" in GPTQ_V1.notes(checkpoint, layout)[0]


def test_group_index_out_of_range_is_refused(tmp_path: Path) -> None:
    layout = layout_of()
    index_I = torch.arange(64, dtype=torch.int32) // 16
    checkpoint = write_linears(
        tmp_path, [layout], {NAME: random_weight(layout)}, format_name="gptq", replaced={f"{NAME}.g_idx": index_I}
    )
    with pytest.raises(FormatError, match="groups from 0 to 1, found 0 to 3"):
        GPTQ_V1.decode(checkpoint, layout)


def test_symmetric_label_on_varying_zero_points_is_noted(tmp_path: Path) -> None:
    layout = layout_of(symmetric=False)
    weight = random_weight(layout)
    checkpoint = write_linears(tmp_path, [layout], {NAME: weight}, format_name="gptq", config={"sym": True})
    (found,) = GPTQ_V1.read_layouts(checkpoint)
    assert found.symmetric
    assert same_weight(GPTQ_V1.decode(checkpoint, found), weight)
    assert "the zero points vary" in GPTQ_V1.notes(checkpoint, found)[0]


def test_short_last_group_of_foreign_files(tmp_path: Path) -> None:
    layout = layout_of(columns=80)
    weight = random_weight(layout)
    assert weight.num_groups == 3
    checkpoint = write_linears(tmp_path, [layout], {NAME: weight}, format_name="gptq")
    (found,) = GPTQ_V1.read_layouts(checkpoint)
    assert same_weight(GPTQ_V1.decode(checkpoint, found), weight)


def test_files_without_group_index(tmp_path: Path) -> None:
    layout = layout_of()
    weight = random_weight(layout)
    tensors = GPTQ_V1.encode(layout, weight)
    del tensors[f"{NAME}.g_idx"]
    config = {"quantization_config": GPTQ_V1.quantization_config([layout])}
    checkpoint = write_tensors(tmp_path, tensors, config)
    (found,) = GPTQ_V1.read_layouts(checkpoint)
    assert same_weight(GPTQ_V1.decode(checkpoint, found), weight)


@pytest.mark.parametrize(
    ("suffix", "shape", "dtype"),
    [
        ("qweight", (7, 32), torch.int32),
        ("qweight", (8, 32), torch.int64),
        ("qzeros", (2, 5), torch.int32),
        ("scales", (3, 32), torch.float16),
        ("scales", (2, 32), torch.int32),
        ("g_idx", (65,), torch.int32),
        ("g_idx", (64,), torch.int64),
    ],
)
def test_shapes_that_contradict_the_configuration(
    tmp_path: Path, suffix: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layout = layout_of()
    replaced = {f"{NAME}.{suffix}": torch.zeros(shape, dtype=dtype)}
    checkpoint = write_linears(tmp_path, [layout], {NAME: random_weight(layout)}, format_name="gptq", replaced=replaced)
    with pytest.raises(FormatError) as caught:
        GPTQ_V1.read_layouts(checkpoint)
    assert f"tensor {NAME}." in caught.value.where
    assert caught.value.exit_code == ExitCode.INPUT
