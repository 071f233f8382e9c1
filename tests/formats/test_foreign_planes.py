"""Planes of LUT-GEMM, AnyBCQ and BPDQ: read as their formulas say, never written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import write_tensors

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.convert import convert
from optgptq.errors import ExitCode, FormatError, TargetError
from optgptq.formats import READ_ONLY_FORMATS, detect
from optgptq.formats.verify import verify_folder
from optgptq.packing.planes import pack_planes
from optgptq.reports.inspect import inspect_checkpoint

NAME = "model.layers.0.mlp.down_proj"
OTHER = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS, GROUPS = 5, 96, 3


def bits_of(num_planes: int, *, seed: int = 0) -> torch.Tensor:
    """Random bits `[planes, rows, columns]`, 0 and 1."""
    return torch.randint(0, 2, (num_planes, ROWS, COLUMNS), generator=torch.Generator().manual_seed(seed))


def planes_of(bits_POI: torch.Tensor) -> torch.Tensor:
    powers_P = 2 ** torch.arange(len(bits_POI))
    codes_OI = (bits_POI * powers_P[:, None, None]).sum(dim=0).to(torch.uint8)
    return pack_planes(codes_OI, len(bits_POI))


def signed_normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lut_gemm() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    bits_POI, alpha_GPO = bits_of(3), signed_normal(GROUPS, 3, ROWS, seed=1).half()
    bias_GO = signed_normal(GROUPS, ROWS, seed=2).half()
    dense_OI = torch.empty(ROWS, COLUMNS, dtype=torch.float64)
    for row in range(ROWS):
        for column in range(COLUMNS):
            group = column // (COLUMNS // GROUPS)
            signs_P = 2.0 * bits_POI[:, row, column] - 1
            dense_OI[row, column] = bias_GO[group, row] + (alpha_GPO[group, :, row].double() * signs_P).sum()
    tensors = {"binary": planes_of(bits_POI), "alpha": alpha_GPO, "q_bias": bias_GO}
    return tensors, dense_OI


def anybcq() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Four planes; 2 and 3 of them have coefficients, so that the fourth is not used."""
    bits_POI = bits_of(4)
    tensors = {"qweight": planes_of(bits_POI)}
    for number in (2, 3):
        tensors[f"alpha_{number}"] = signed_normal(GROUPS, number, ROWS, seed=number).half()
        tensors[f"beta_{number}"] = signed_normal(GROUPS, ROWS, seed=10 + number).half()
    dense_OI = torch.empty(ROWS, COLUMNS, dtype=torch.float64)
    for row in range(ROWS):
        for column in range(COLUMNS):
            group = column // (COLUMNS // GROUPS)
            signs_P = 2.0 * bits_POI[:3, row, column] - 1
            products_P = tensors["alpha_3"][group, :, row].double() * signs_P
            dense_OI[row, column] = tensors["beta_3"][group, row] + products_P.sum()
    return tensors, dense_OI


def bpdq() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Bits of 0 and 1, the constant last."""
    bits_POI, stored_GPO = bits_of(2), signed_normal(GROUPS, 3, ROWS, seed=1).bfloat16()
    dense_OI = torch.empty(ROWS, COLUMNS, dtype=torch.float64)
    for row in range(ROWS):
        for column in range(COLUMNS):
            values_P = stored_GPO[column // (COLUMNS // GROUPS), :, row].double()
            dense_OI[row, column] = values_P[2] + (values_P[:2] * bits_POI[:, row, column]).sum()
    return {"B": planes_of(bits_POI), "c": stored_GPO}, dense_OI


SAMPLES = {"lut-gemm": lut_gemm, "anybcq": anybcq, "bpdq": bpdq}


def written(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> CheckpointFolder:
    named = {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return write_tensors(
        folder, {**named, "model.norm.weight": torch.ones(4).half()}, {"model_type": "llama", **config}
    )


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "other", "bits": 3}}])
@pytest.mark.parametrize("name", list(SAMPLES))
def test_the_weight_is_that_of_the_formula(tmp_path: Path, name: str, config: dict[str, object]) -> None:
    tensors, dense_OI = SAMPLES[name]()
    checkpoint = written(tmp_path, tensors, **config)
    form = detect(checkpoint)
    assert form is READ_ONLY_FORMATS[name]
    (layout,) = form.read_layouts(checkpoint)
    assert (layout.name, layout.out_features, layout.in_features) == (NAME, ROWS, COLUMNS)
    assert (layout.group_size, layout.coefficients) == (COLUMNS // GROUPS, "float")
    weight = form.decode(checkpoint, layout)
    torch.testing.assert_close(weight.dequantize().double(), dense_OI, rtol=0, atol=1e-6)
    assert list(weight.problems()) == []
    report = verify_folder(checkpoint)
    assert (report.format, report.problems) == (name, ())
    assert {f"{NAME}.{suffix}" for suffix in tensors} <= {f"{NAME}.{suffix}" for suffix in form.suffixes}


def test_bits_per_weight_count_the_precision_that_is_read(tmp_path: Path) -> None:
    tensors, _ = anybcq()
    report = inspect_checkpoint(written(tmp_path, tensors))
    assert report.layers[0].bits == 3
    assert report.bits_per_weight == pytest.approx(3 + 16 * 4 / 32)


def test_several_precisions_are_noted(tmp_path: Path) -> None:
    tensors, _ = anybcq()
    (note,) = verify_folder(written(tmp_path / "several", tensors)).notes
    assert note.endswith("it holds precisions of 2, 3 bits; the highest is read")
    lower = {name: tensor for name, tensor in tensors.items() if not name.endswith("_3")}
    checkpoint = written(tmp_path / "one", lower)
    assert verify_folder(checkpoint).notes == ()
    assert READ_ONLY_FORMATS["anybcq"].read_layouts(checkpoint)[0].bits == 2


def test_one_group_spans_the_row(tmp_path: Path) -> None:
    tensors = {"binary": planes_of(bits_of(2)), "alpha": torch.ones(1, 2, ROWS), "q_bias": torch.zeros(1, ROWS)}
    checkpoint = written(tmp_path, tensors)
    assert READ_ONLY_FORMATS["lut-gemm"].read_layouts(checkpoint)[0].group_size == -1


@pytest.mark.parametrize(
    ("name", "suffix", "tensor", "where"),
    [
        ("lut-gemm", "alpha", torch.ones(5, 3, ROWS), "tensors of"),
        ("lut-gemm", "alpha", torch.ones(3, 2, ROWS), f"tensor {NAME}.alpha"),
        ("lut-gemm", "q_bias", torch.ones(2, ROWS), f"tensor {NAME}.q_bias"),
        ("lut-gemm", "binary", torch.ones(3, 3, ROWS), f"tensor {NAME}.binary"),
        ("anybcq", "alpha_3", torch.ones(3, 4, ROWS), f"tensor {NAME}.alpha_3"),
        ("bpdq", "c", torch.ones(3, 2, ROWS), f"tensor {NAME}.c"),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, name: str, suffix: str, tensor: torch.Tensor, where: str) -> None:
    tensors, _ = SAMPLES[name]()
    checkpoint = written(tmp_path, {**tensors, suffix: tensor})
    with pytest.raises(FormatError) as caught:
        READ_ONLY_FORMATS[name].read_layouts(checkpoint)
    assert where in caught.value.where
    assert caught.value.exit_code == ExitCode.INPUT


def test_more_coefficients_than_planes(tmp_path: Path) -> None:
    tensors, _ = anybcq()
    more = {"alpha_5": torch.ones(3, 5, ROWS), "beta_5": torch.ones(3, ROWS)}
    with pytest.raises(FormatError, match="tensors of"):
        READ_ONLY_FORMATS["anybcq"].read_layouts(written(tmp_path, {**tensors, **more}))


@pytest.mark.parametrize(
    ("name", "kept", "missing"),
    [
        ("lut-gemm", ["binary"], "alpha"),
        ("lut-gemm", ["binary", "alpha"], "q_bias"),
        ("lut-gemm", ["binary", "q_bias"], "alpha"),
        ("lut-gemm", ["alpha"], "binary"),
        ("lut-gemm", ["alpha", "q_bias"], "binary"),
        ("anybcq", ["qweight"], "alpha_4"),
        ("anybcq", ["qweight", "alpha_2", "beta_2", "beta_3"], "alpha_3"),
        ("anybcq", ["qweight", "alpha_2", "alpha_3", "beta_3"], "beta_2"),
        ("anybcq", ["beta_3"], "qweight"),
        ("bpdq", ["B"], "c"),
        ("bpdq", ["c"], "B"),
    ],
)
def test_a_linear_of_which_a_part_is_missing_is_refused(
    tmp_path: Path, name: str, kept: list[str], missing: str
) -> None:
    """Beside a whole one, by which the layout is told."""
    tensors, _ = SAMPLES[name]()
    named = {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()}
    named |= {f"{OTHER}.{suffix}": tensors[suffix] for suffix in kept}
    checkpoint = write_tensors(tmp_path / "in", named, {"model_type": "llama"})
    assert detect(checkpoint) is READ_ONLY_FORMATS[name]
    for attempt in (
        lambda: verify_folder(checkpoint),
        lambda: convert(checkpoint.path, tmp_path / "out", to="optgptq"),
    ):
        with pytest.raises(FormatError, match="no such tensor beside") as caught:
            attempt()
        assert caught.value.where.endswith(f"tensor {OTHER}.{missing}")
        assert caught.value.exit_code == ExitCode.INPUT
    assert not (tmp_path / "out").exists()


def test_planes_of_another_shape_beside_ours_are_refused(tmp_path: Path) -> None:
    tensors, _ = anybcq()
    named = {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()}
    named[f"{OTHER}.qweight"] = torch.zeros(12, ROWS, dtype=torch.int32)
    checkpoint = write_tensors(tmp_path, named, {"model_type": "llama"})
    with pytest.raises(FormatError, match=r"\[words, planes, rows\] .*, found \[12, 5\]") as caught:
        verify_folder(checkpoint)
    assert caught.value.where.endswith(f"tensor {OTHER}.qweight")


def test_damaged_coefficients_are_named(tmp_path: Path) -> None:
    tensors, _ = bpdq()
    tensors["c"][1, 0, 2] = torch.nan
    checkpoint = written(tmp_path, tensors)
    (problem,) = verify_folder(checkpoint).problems
    assert problem.where.endswith(f"tensor {NAME}.c")


def test_they_are_never_written() -> None:
    for form in READ_ONLY_FORMATS.values():
        for attempt in (
            lambda form=form: form.check([], scale_dtype=torch.float16),
            lambda form=form: form.quantization_config([]),
            lambda form=form: form.extra_files([]),
        ):
            with pytest.raises(TargetError, match="found one that it only reads") as caught:
                attempt()
            assert caught.value.where == form.name
