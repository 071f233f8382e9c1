"""Sign planes on disk: golden words, exact round trips of every storage, refusals, damage that is named."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.binary_weights import STORAGES, plane_layout, random_binary, same_binary
from support.checkpoints import random_weight, write_linears, write_tensors

from optgptq.binary_weight import BinaryWeight
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.coefficients import ByteCoefficients, FloatCoefficients, StepCoefficients
from optgptq.errors import ExitCode, FormatError, TargetError
from optgptq.formats import FORMATS, detect
from optgptq.formats.planes import PLANES_FORMAT
from optgptq.formats.verify import verify_folder, weight_digest
from optgptq.layout import CoefficientStorage, LinearLayout
from optgptq.reports.inspect import inspect_checkpoint

NAME = plane_layout().name


def written(
    folder: Path, layout: LinearLayout, weight: BinaryWeight, **replaced: torch.Tensor | None
) -> CheckpointFolder:
    """A checkpoint of one linear; `replaced` changes its tensors by suffix, None drops one."""
    tensors: dict[str, torch.Tensor] = dict(PLANES_FORMAT.encode(layout, weight))
    for suffix, tensor in replaced.items():
        tensors.pop(f"{NAME}.{suffix}", None)
        if tensor is not None:
            tensors[f"{NAME}.{suffix}"] = tensor
    config = {"model_type": "llama", "quantization_config": PLANES_FORMAT.quantization_config([layout])}
    return write_tensors(folder, tensors, config)


def read_back(checkpoint: CheckpointFolder) -> BinaryWeight:
    (layout,) = PLANES_FORMAT.read_layouts(checkpoint)
    return PLANES_FORMAT.decode(checkpoint, layout)


@settings(deadline=None)
@given(
    bits=st.integers(1, 4),
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([-1, 32, 64]),
    storage=st.sampled_from(STORAGES),
    ordered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_round_trip(
    bits: int, rows: int, groups: int, group_size: int, storage: CoefficientStorage, ordered: bool, seed: int
) -> None:
    columns = 45 * groups if group_size == -1 else groups * group_size
    layout = plane_layout(rows=rows, columns=columns, bits=bits, group_size=group_size, coefficients=storage)
    weight = random_binary(layout, seed=seed, ordered=ordered)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = written(Path(folder), layout, weight)
        assert detect(checkpoint) is FORMATS["optgptq"]
        decoded = read_back(checkpoint)
        assert verify_folder(checkpoint).problems == ()
    assert same_binary(decoded, weight)
    assert weight_digest(decoded) == weight_digest(weight)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (45, -1), (64, 64)])
def test_entries_are_the_encoded_tensors(storage: CoefficientStorage, columns: int, group_size: int) -> None:
    layout = plane_layout(columns=columns, group_size=group_size, coefficients=storage)
    tensors = PLANES_FORMAT.encode(layout, random_binary(layout))
    for dense_dtype in (torch.float32, torch.bfloat16):
        entries = PLANES_FORMAT.entries(layout, dense_dtype=dense_dtype)
        assert [(entry.name, entry.dtype, entry.shape) for entry in entries] == [
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
        ]
    assert {name.rpartition(".")[2] for name in tensors} < set(PLANES_FORMAT.suffixes)


def test_golden_tensors() -> None:
    layout = plane_layout(rows=2, columns=64, bits=2)
    codes_OI = torch.stack([torch.arange(64) % 4, (torch.arange(64) >= 32) * 3]).to(torch.uint8)
    alpha_OGP = torch.tensor([[[2.0, 1.0], [4.0, 3.0]], [[6.0, 5.0], [8.0, 7.0]]]).half()
    offset_OG = torch.tensor([[0.5, -0.5], [1.5, -1.5]]).half()
    weight = BinaryWeight(
        codes_OI=codes_OI, coefficients=FloatCoefficients(alpha_OGP, offset_OG), bits=2, group_size=32
    )
    tensors = PLANES_FORMAT.encode(layout, weight)
    planes = [
        [[word & 0xFFFFFFFF for word in row] for row in plane] for plane in tensors[f"{NAME}.bcq_planes"].tolist()
    ]
    assert planes == [[[0xAAAAAAAA, 0], [0xCCCCCCCC, 0]], [[0xAAAAAAAA, 0xFFFFFFFF], [0xCCCCCCCC, 0xFFFFFFFF]]]
    assert tensors[f"{NAME}.bcq_alpha"].tolist() == [[[2, 6], [1, 5]], [[4, 8], [3, 7]]]
    assert tensors[f"{NAME}.bcq_offset"].tolist() == [[0.5, 1.5], [-0.5, -1.5]]
    bytes_ = ByteCoefficients(alpha_OGP.to(torch.int8), offset_OG.to(torch.int8), torch.tensor([1.0, 2.0]).half())
    tensors = PLANES_FORMAT.encode(replace(layout, coefficients="int8"), replace(weight, coefficients=bytes_))
    assert tensors[f"{NAME}.bcq_alpha"].tolist() == [[[2, 6], [1, 5]], [[4, 8], [3, 7]]]
    assert tensors[f"{NAME}.bcq_alpha"].dtype == tensors[f"{NAME}.bcq_offset"].dtype == torch.int8
    assert tensors[f"{NAME}.bcq_row_scale"].tolist() == [1, 2]
    steps = StepCoefficients(torch.tensor([[2, 1], [3, 1]], dtype=torch.uint8), offset_OG.abs(), offset_OG)
    tensors = PLANES_FORMAT.encode(replace(layout, coefficients="steps"), replace(weight, coefficients=steps))
    assert tensors[f"{NAME}.bcq_steps"].tolist() == [[2, 3], [1, 1]]
    assert tensors[f"{NAME}.bcq_scale"].tolist() == [[0.5, 1.5], [0.5, 1.5]]
    order_I = torch.arange(63, -1, -1, dtype=torch.int32)
    ordered = PLANES_FORMAT.encode(layout, replace(weight, column_order_I=order_I))
    assert torch.equal(ordered[f"{NAME}.bcq_perm"], order_I)


def test_columns_that_do_not_fill_words_are_padded_with_zeros(tmp_path: Path) -> None:
    layout = plane_layout(columns=45, group_size=-1)
    checkpoint = written(tmp_path, layout, random_binary(layout))
    planes_WPO = checkpoint.read(f"{NAME}.bcq_planes")
    assert planes_WPO.shape == (2, 3, 5)
    assert not bool((planes_WPO[1] >> 13).any())
    assert PLANES_FORMAT.read_layouts(checkpoint)[0].in_features == 45


@pytest.mark.parametrize(("columns", "group_size"), [(45, 45), (45, -1), (64, 64), (64, -1)])
def test_a_group_of_a_whole_row_stays_as_it_was_said(tmp_path: Path, columns: int, group_size: int) -> None:
    layout = plane_layout(columns=columns, group_size=group_size)
    checkpoint = written(tmp_path, layout, random_binary(layout))
    assert PLANES_FORMAT.read_layouts(checkpoint)[0].group_size == group_size
    assert verify_folder(checkpoint).problems == ()


def test_planes_may_be_in_any_order(tmp_path: Path) -> None:
    """The smallest coefficient first: the same weight, with the bits of its codes turned around."""
    layout = plane_layout(bits=2)
    weight = random_binary(layout)
    alpha_OGP, offset_OG = weight.coefficients.tensors()
    codes_OI = (weight.codes_OI >> 1) | (weight.codes_OI & 1) << 1
    ascending = replace(weight, codes_OI=codes_OI, coefficients=FloatCoefficients(alpha_OGP.flip(2), offset_OG))
    checkpoint = written(tmp_path, layout, ascending)
    assert verify_folder(checkpoint).problems == ()
    assert same_binary(read_back(checkpoint), ascending)
    torch.testing.assert_close(read_back(checkpoint).dequantize(), weight.dequantize(), rtol=0, atol=1e-6)


def test_only_optgptq_reads_it() -> None:
    (warning,) = PLANES_FORMAT.check([plane_layout()], scale_dtype=torch.float16)
    assert warning.startswith("only optgptq reads this layout: vLLM, SGLang and transformers")


@pytest.mark.parametrize(
    ("layout", "expected", "action"),
    [
        (plane_layout(bits=5), "1 to 4 bits", "another width"),
        (replace(plane_layout(), coefficients=None), "binary codes", "uniform grids or binary codes, not both"),
        (plane_layout(columns=384, group_size=180), "multiple of 32 that divides its 384 columns", "group size 192"),
        (plane_layout(columns=384, group_size=160), "multiple of 32 that divides its 384 columns", "group size 128"),
        (plane_layout(columns=64, group_size=96), "multiple of 32 that divides its 64 columns", "group size 32"),
        (plane_layout(columns=45, group_size=32), "multiple of 32 that divides its 45 columns", "group size -1"),
    ],
)
def test_what_it_cannot_hold_is_refused(layout: LinearLayout, expected: str, action: str) -> None:
    for attempt in (
        lambda: PLANES_FORMAT.check([layout], scale_dtype=torch.float16),
        lambda: PLANES_FORMAT.entries(layout, dense_dtype=torch.float16),
        lambda: PLANES_FORMAT.encode(layout, random_binary(replace(layout, coefficients="float"))),
    ):
        with pytest.raises(TargetError) as caught:
            attempt()
        assert (caught.value.where, caught.value.exit_code) == (NAME, ExitCode.TARGET)
        assert expected in caught.value.expected
        assert action in caught.value.action
        # A conversion has no recipe: what it can do is said, too.
        assert layout.coefficients is None or "keep its layout" in caught.value.action


def test_kinds_of_weight_are_not_mixed_up() -> None:
    uniform = LinearLayout(name=NAME, out_features=32, in_features=64, bits=3, group_size=32)
    with pytest.raises(TargetError, match="expected binary codes, found a uniform grid"):
        PLANES_FORMAT.encode(plane_layout(rows=32), random_weight(uniform))
    for name in ("gptq", "gptq_v2", "compressed-tensors"):
        with pytest.raises(TargetError, match=r"found binary codes\. Use export\.format=optgptq"):
            FORMATS[name].encode(uniform, random_binary(plane_layout(rows=32)))
        with pytest.raises(TargetError, match=r"found binary codes\. Use export\.format=optgptq"):
            FORMATS[name].check([plane_layout(rows=32)], scale_dtype=torch.float16)


def test_a_weight_of_another_layout_is_a_bug() -> None:
    for other in (plane_layout(rows=6), plane_layout(columns=96), plane_layout(bits=2), plane_layout(group_size=64)):
        with pytest.raises(FormatError, match="it is a bug in optgptq"):
            PLANES_FORMAT.encode(other, random_binary(plane_layout()))
    with pytest.raises(FormatError, match="storage"):
        PLANES_FORMAT.encode(plane_layout(coefficients="int8"), random_binary(plane_layout()))


def test_coefficients_that_overflowed_are_not_written() -> None:
    layout = plane_layout()
    weight = random_binary(layout)
    for tensor in weight.coefficients.tensors():
        tensor.reshape(-1)[0] = torch.inf
    with pytest.raises(FormatError, match=r"down_proj, coefficients: expected finite values .* found 1 of 30"):
        PLANES_FORMAT.encode(layout, weight)


@pytest.mark.parametrize(
    ("storage", "suffix", "place", "value"),
    [
        ("float", "bcq_alpha", (1, 2, 3), torch.nan),
        ("float", "bcq_alpha", (1, 2, 3), -1.0),
        ("float", "bcq_offset", (1, 3), torch.inf),
        ("int8", "bcq_alpha", (1, 2, 3), -5),
        ("int8", "bcq_row_scale", (3,), 0.0),
        ("steps", "bcq_steps", (2, 3), 0),
        ("steps", "bcq_scale", (1, 3), -1.0),
        ("steps", "bcq_offset", (1, 3), torch.nan),
        ("float", "bcq_perm", (5,), 6),
        ("float", "bcq_perm", (5,), -1),
        ("float", "bcq_perm", (5,), 45),
        ("float", "bcq_planes", (1, 2, 3), -1),
    ],
)
def test_damage_is_named(
    tmp_path: Path, storage: CoefficientStorage, suffix: str, place: tuple[int, ...], value: float
) -> None:
    layout = plane_layout(columns=45, group_size=-1, coefficients=storage)
    weight = replace(random_binary(layout), column_order_I=torch.arange(45, dtype=torch.int32))
    tensor = PLANES_FORMAT.encode(layout, weight)[f"{NAME}.{suffix}"].clone()
    tensor[tuple(min(index, size - 1) for index, size in zip(place, tensor.shape, strict=True))] = value
    checkpoint = written(tmp_path, layout, weight, **{suffix: tensor})
    with pytest.raises(FormatError) as caught:
        read_back(checkpoint)
    assert f"tensor {NAME}.{suffix}" in caught.value.where
    assert caught.value.exit_code == ExitCode.INPUT
    (problem,) = verify_folder(checkpoint).problems
    assert problem.where == caught.value.where


@pytest.mark.parametrize(
    ("suffix", "tensor"),
    [
        ("bcq_planes", torch.zeros(3, 3, 5, dtype=torch.int32)),
        ("bcq_planes", torch.zeros(2, 2, 5, dtype=torch.int32)),
        ("bcq_planes", torch.zeros(2, 3, 5, dtype=torch.int64)),
        ("bcq_planes", torch.zeros(2, 15, dtype=torch.int32)),
        ("bcq_planes", torch.zeros(2, 3, 0, dtype=torch.int32)),
        ("bcq_alpha", torch.zeros(1, 3, 5, dtype=torch.float16)),
        ("bcq_alpha", torch.zeros(2, 3, 5, dtype=torch.int8)),
        ("bcq_alpha", None),
        ("bcq_offset", torch.zeros(2, 4, dtype=torch.float16)),
        ("bcq_perm", torch.zeros(63, dtype=torch.int32)),
        ("bcq_perm", torch.zeros(64, dtype=torch.int64)),
    ],
)
def test_shapes_that_contradict_the_configuration(tmp_path: Path, suffix: str, tensor: torch.Tensor | None) -> None:
    layout = plane_layout()
    checkpoint = written(tmp_path, layout, random_binary(layout), **{suffix: tensor})
    with pytest.raises(FormatError) as caught:
        PLANES_FORMAT.read_layouts(checkpoint)
    # More words than columns show as groups that do not add up.
    assert f"tensor {NAME}." in caught.value.where or "a multiple of 32 and divides" in caught.value.expected


def test_planes_of_linears_that_are_dense_or_missing(tmp_path: Path) -> None:
    layout = plane_layout()
    dense = replace(layout, name="lm_head", bits=None, coefficients=None)
    config = PLANES_FORMAT.quantization_config([layout, dense])
    tensors = PLANES_FORMAT.encode(layout, random_binary(layout))
    for change, found in (
        ({"dense": [NAME]}, "planes of a linear that it says is dense"),
        ({"linears": {"other": {"bits": 2}}}, "none"),
    ):
        folder = tmp_path / found[:4]
        checkpoint = write_tensors(folder, tensors, {"quantization_config": {**config, **change}})
        with pytest.raises(FormatError) as caught:
            PLANES_FORMAT.read_layouts(checkpoint)
        assert caught.value.found == found
    checkpoint = write_tensors(tmp_path / "empty", {"a": torch.ones(1)}, {"quantization_config": config})
    with pytest.raises(FormatError, match=r"tensor \*\.bcq_planes"):
        PLANES_FORMAT.read_layouts(checkpoint)


@pytest.mark.parametrize("storage", STORAGES)
def test_inspect_counts_everything_that_is_stored(tmp_path: Path, storage: CoefficientStorage) -> None:
    layout = plane_layout(columns=45, group_size=-1, coefficients=storage)
    weight = random_binary(layout, ordered=True)
    report = inspect_checkpoint(written(tmp_path, layout, weight))
    (layer,) = report.layers
    assert (report.format, layer.coefficients, layer.bits, layer.symmetric) == ("optgptq", storage, 3, False)
    assert layer.bits_per_weight == weight.stored_bits(zero_points_stored=False) / (5 * 45)


def test_linears_written_by_the_support_of_other_formats(tmp_path: Path) -> None:
    """Several linears, all storages, one dense matrix: all found under their own settings."""
    layouts = [plane_layout(name=f"layers.0.{storage}", coefficients=storage, bits=2) for storage in STORAGES]
    weights = {layout.name: random_binary(layout, seed=3) for layout in layouts}
    checkpoint = write_linears(
        tmp_path,
        layouts,
        weights,  # type: ignore[arg-type]
        format_name="optgptq",
        replaced={"layers.0.dense.weight": torch.ones(4, 8)},
    )
    found = {layout.name: layout for layout in PLANES_FORMAT.read_layouts(checkpoint)}
    assert found["layers.0.dense"].bits is None
    for layout in layouts:
        assert found[layout.name].coefficients == layout.coefficients
        assert same_binary(PLANES_FORMAT.decode(checkpoint, found[layout.name]), weights[layout.name])
