"""The main job with binary codes: families, commands that read the result, and what cannot be done as asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quantizable import tiny_model, wide_llama, write_model

from optgptq.binary_weight import BinaryWeight
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.convert import convert
from optgptq.errors import RecipeError, TargetError
from optgptq.formats import detect
from optgptq.formats.verify import verify_folder
from optgptq.models.inventory import model_linears
from optgptq.models.registry import model_spec
from optgptq.quantize import QuantizeResult, quantize
from optgptq.recipe.calibration import CalibrationRecipe
from optgptq.recipe.loading import load_recipe
from optgptq.recipe.records import AttentionRecipe, ExportRecipe, Recipe, TransformRecipe
from optgptq.recipe.weights import BINARY_METHODS, BinaryRecipe, Method, WeightRecipe
from optgptq.reports.inspect import inspect_checkpoint
from optgptq.runtime.load import load_model
from optgptq.solvers import METHODS

FAMILIES = (
    "llama-grouped_query",
    "qwen3-norms",
    "gemma2-softcaps",
    "phi3-longrope",
    "gpt2-conv1d",
    "gptneox-parallel",
    "opt-post_norm_projected",
    "bloom-residual_after_norm",
    "mpt-alibi",
    "falcon-grouped",
)
TOKENS = torch.arange(24).view(2, 12)


def binary_recipe(
    *, binary: dict[str, Any] | None = None, export: str = "optgptq", windows: int = 6, **weights: Any
) -> Recipe:
    """Return a recipe with one code per row, targets shifted, six windows of 16 tokens."""
    chosen = {"method": "binary", "bits": 2, "group_size": -1, "target_shift": "exact", **weights}
    return Recipe(
        weights=WeightRecipe(**chosen),
        attention=AttentionRecipe(value_share=0.5),
        binary=BinaryRecipe(**{"refits": 1, "sweeps": 1, **(binary or {})}),
        calibration=CalibrationRecipe(num_windows=windows, window_size=16),
        export=ExportRecipe.model_validate({"format": export}),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by name, written when first asked for."""

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            sizes = {"hidden_size": 64, "intermediate_size": 128}
            tiny = wide_llama(**sizes) if name == "wide" else tiny_model(name)
            self[name] = write_model(tiny, tmp_path_factory.mktemp("models") / "model")
            return self[name]

    return Folders()


def decoded(folder: Path) -> dict[str, BinaryWeight]:
    """Return every quantized weight of a folder, which must all be in binary codes."""
    checkpoint = CheckpointFolder.open(folder)
    form = detect(checkpoint)
    assert form is not None
    weights = {}
    for layout in form.read_layouts(checkpoint):
        if layout.bits is not None:
            weight = form.decode(checkpoint, layout)
            assert isinstance(weight, BinaryWeight)
            weights[layout.name] = weight
    return weights


def is_whole(result: QuantizeResult, model: Path, method: str) -> None:
    """Check that all linears are quantized by the method, and that the folder is sound."""
    names = sorted(info.name for info in model_linears(model_spec(CheckpointFolder.open(model))))
    layers = result.record["layers"]
    assert sorted(layer["name"] for layer in layers) == names
    assert {layer["method"] for layer in layers} == {method}
    assert all(0 <= layer["loss"] < 1 for layer in layers)
    assert verify_folder(CheckpointFolder.open(result.output)).problems == ()
    assert sorted(decoded(result.output)) == names


def test_methods_of_the_recipe_are_those_of_the_solvers() -> None:
    assert set(get_args(Method)) == METHODS.keys()
    assert {name for name, method in METHODS.items() if method.binary is not None} == BINARY_METHODS


@pytest.mark.parametrize("method", ["binary", "attention_aware_binary"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, method: str, models: dict[str, Path], tmp_path: Path) -> None:
    is_whole(quantize(models[name], binary_recipe(method=method), tmp_path / "out"), models[name], method)


@pytest.mark.parametrize("coefficients", ["float", "int8", "steps"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_stored_is_what_runs(bits: int, coefficients: str, models: dict[str, Path], tmp_path: Path) -> None:
    recipe = binary_recipe(bits=bits, group_size=32, binary={"coefficients": coefficients})
    result = quantize(models["wide"], recipe, tmp_path / "out")
    is_whole(result, models["wide"], "binary")
    assert {layer["coefficients"] for layer in result.record["layers"]} == {coefficients}
    weights = decoded(result.output)
    assert {weight.coefficients.storage for weight in weights.values()} == {coefficients}
    assert inspect_checkpoint(CheckpointFolder.open(result.output)).bits_per_weight == pytest.approx(
        result.bits_per_weight
    )
    dense = load_model(result.output).hidden(TOKENS)
    packed = load_model(result.output, weights="exact").hidden(TOKENS)
    assert torch.allclose(dense, packed, rtol=1e-4, atol=1e-3)


def test_rotated_weights_in_binary_codes(models: dict[str, Path], tmp_path: Path) -> None:
    plain = binary_recipe(method="attention_aware_binary")
    rotated = plain.model_copy(
        update={"transform": TransformRecipe(residual_rotation="hadamard", value_rotation="hadamard", seed=3)}
    )
    result = quantize(models["wide"], rotated, tmp_path / "out")
    is_whole(result, models["wide"], "attention_aware_binary")
    assert bool(torch.isfinite(load_model(result.output).hidden(TOKENS)).all())


def test_published_gptqt_has_one_code_per_row_in_float16(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = binary_recipe(method="gptqt", target_shift="off", order="natural", binary={"refits": 3, "sweeps": 2})
    result = quantize(models["wide"], recipe, tmp_path / "out")
    is_whole(result, models["wide"], "gptqt")
    for weight in decoded(result.output).values():
        assert weight.coefficients.storage == "float"
        alpha_OGP, _ = weight.coefficients.values()
        # Whole steps of one scale: what the published method puts a row on.
        assert weight.num_groups == 1
        ratio_O = alpha_OGP[:, 0, 0] / alpha_OGP[:, 0, 1]
        fractions = {high / low for low in range(1, 16) for high in range(low, 16)}
        assert all(min(abs(float(ratio) - each) for each in fractions) < 2e-3 for ratio in ratio_O)


def test_some_linears_in_more_bits_and_some_dense(models: dict[str, Path], tmp_path: Path) -> None:
    rules = [{"match": "down_proj", "bits": 4}, {"match": "layers.0.self_attn.o_proj", "keep_dense": True}]
    result = quantize(models["wide"], binary_recipe(rules=rules, group_size=32), tmp_path / "out")
    bits = {name: weight.bits for name, weight in decoded(result.output).items()}
    assert {count for name, count in bits.items() if "down_proj" in name} == {4}
    assert {count for name, count in bits.items() if "down_proj" not in name} == {2}
    assert "model.layers.0.self_attn.o_proj" not in bits


def test_two_runs_write_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = binary_recipe(method="attention_aware_binary", bits=3, group_size=32)
    folders = []
    for name in ("first", "second"):
        output = quantize(models["wide"], recipe, tmp_path / name).output
        folders.append({path.name: path.read_bytes() for path in sorted(output.iterdir())})
    assert folders[0] == folders[1]


def test_sums_of_signs_do_not_become_a_uniform_grid(models: dict[str, Path], tmp_path: Path) -> None:
    folder = quantize(models["wide"], binary_recipe(group_size=32), tmp_path / "out").output
    with pytest.raises(TargetError):
        convert(folder, tmp_path / "other", to="gptq_v2")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("weights", "export", "expected"),
    [
        ({}, "gptq", "binary"),
        ({}, "compressed-tensors", "binary"),
        ({"method": "gptq"}, "optgptq", "binary codes"),
        ({"group_size": 16}, "optgptq", "a group size of -1, or a multiple of 32"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_read(
    weights: dict[str, Any], export: str, expected: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(TargetError) as caught:
        quantize(models["wide"], binary_recipe(export=export, **weights), tmp_path / "out")
    assert expected in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["weights.bits=8"], "weights.bits"),
        (["binary.intermediate_bits=3", "weights.bits=3"], "weights.bits"),
        (["weights.scale_refit=true"], "weights.scale_refit"),
        (["weights.code_sweeps=2"], "weights.code_sweeps"),
        (["weights.group_grids=static"], "weights.group_grids"),
        (["weights.symmetric=false"], "weights.symmetric"),
        (["weights.grid_search=mse"], "weights.grid_search"),
        (["weights.method=gptqt", "binary.refits=5"], "binary.refits"),
        (["weights.method=gptqt", "binary.coefficients=int8", "binary.weighting=none"], "binary.weighting"),
        (["weights.target_shift=gptaq", "weights.shift_strength=0.25"], "weights.target_shift"),
    ],
)
def test_settings_that_mean_nothing_for_binary_codes_are_refused(overrides: list[str], field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("binary-w2", overrides)
    assert caught.value.exit_code == 2
    assert field in str(caught.value)


def test_a_weight_of_zeros_and_one_of_a_single_value(tmp_path: Path) -> None:
    """A row of zeros comes back exactly; constants and one huge outlier as exactly as float16 says it."""
    folder = write_model(wide_llama(hidden_size=64, intermediate_size=128), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"
    tensors[name][0] = 0.0
    tensors[name][1] = 0.25
    tensors[name][2] = 0.0
    tensors[name][2, 5] = 1000.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = binary_recipe(target_shift="off", group_size=32, binary={"coefficients": "float"})
    weight_OI = decoded(quantize(folder, recipe, tmp_path / "out").output)[name.removesuffix(".weight")].dequantize()
    assert bool(torch.isfinite(weight_OI).all())
    assert torch.equal(weight_OI[0], torch.zeros(64))
    assert torch.allclose(weight_OI[1:3], tensors[name][1:3], rtol=2**-10, atol=1.0)
    assert torch.allclose(weight_OI[1], tensors[name][1], rtol=2**-10, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "optgptq"
