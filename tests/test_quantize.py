"""The main job, end to end: every family, every format, the same bytes twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from support.quantizable import tiny_model, tiny_recipe, wide_llama, write_model
from support.tiny_models import random_tokens

from optgptq.affine_weight import AffineWeight
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.writer import ShardWriter, TensorEntry
from optgptq.errors import TargetError
from optgptq.formats import detect
from optgptq.formats.verify import verify_folder
from optgptq.models.decoder import Decoder, load_decoder
from optgptq.models.inventory import model_linears
from optgptq.models.linear import Linear
from optgptq.models.registry import model_spec
from optgptq.quantize import QuantizeResult, quantize
from optgptq.recipe.calibration import CalibrationRecipe
from optgptq.recipe.records import Recipe
from optgptq.recipe.weights import WeightRecipe
from optgptq.reports import events
from optgptq.runtime.load import load_model
from optgptq.solvers import METHODS, LayerProblem, LayerSolution
from optgptq.solvers.factor import factor_moment

FAMILIES = (
    "llama-multi_head_biases",
    "mistral-short_window",
    "qwen2-biases",
    "qwen3-norms",
    "gemma2-softcaps",
    "gemma3text-local_global",
    "phi3-longrope",
    "gpt2-conv1d",
    "gptneox-parallel",
    "opt-pre_norm",
    "bloom-six_heads",
    "mpt-alibi",
    "falcon-multi_query",
    "falcon-grouped",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by name, written when first asked for."""

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            tiny = wide_llama() if name == "wide" else tiny_model(name)
            self[name] = write_model(tiny, tmp_path_factory.mktemp("models") / "model")
            return self[name]

    return Folders()


@pytest.fixture
def solutions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LayerProblem, LayerSolution]]:
    """Everything that a solver was asked and answered, while the job runs."""
    seen: list[tuple[LayerProblem, LayerSolution]] = []

    def recording(solver: Any) -> Any:
        def solve(problem: LayerProblem) -> LayerSolution:
            solution: LayerSolution = solver(problem)
            seen.append((problem, solution))
            return solution

        return solve

    recorded = {name: replace(method, solver=recording(method.solver)) for name, method in METHODS.items()}
    monkeypatch.setattr("optgptq.calibration.layer.METHODS", recorded)
    return seen


def solved_weights(folder: Path, seen: list[tuple[LayerProblem, LayerSolution]]) -> dict[str, torch.Tensor]:
    """Return the dequantized weight of every linear, taken from the solver and never from a file."""
    by_name = {info.name: info for info in model_linears(model_spec(CheckpointFolder.open(folder)))}
    weights = {}
    for problem, solution in seen:
        begin = 0
        for name in problem.name.split(" + "):
            end = begin + by_name[name].out_features
            weights[name] = solution.weight.dequantize()[begin:end]
            begin = end
    return weights


def decoded(folder: Path) -> dict[str, AffineWeight]:
    source = CheckpointFolder.open(folder)
    form = detect(source)
    assert form is not None
    return {layout.name: form.decode(source, layout) for layout in form.read_layouts(source) if layout.bits is not None}


def with_weights(folder: Path, weights: dict[str, torch.Tensor]) -> Decoder:
    """Return the dense model with some weights replaced."""
    decoder = load_decoder(CheckpointFolder.open(folder))
    for info in model_linears(decoder.spec):
        if info.name in weights:
            linear = decoder.layers[info.layer_index].linears[info.local_name]
            assert isinstance(linear, Linear)
            assert linear.weight_OI.shape == weights[info.name].shape
            linear.weight_OI = weights[info.name]
    return decoder


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("method", "form", "symmetric", "bits"),
    [("gptq", "gptq", True, 4), ("rtn", "compressed-tensors", True, 4), ("gptq", "gptq_v2", False, 3)],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_quantized_to_what_the_solver_found(
    name: str,
    method: str,
    form: str,
    symmetric: bool,
    bits: int,
    models: dict[str, Path],
    solutions: list[tuple[LayerProblem, LayerSolution]],
    tmp_path: Path,
) -> None:
    source, output = models[name], tmp_path / "out"
    recipe = tiny_recipe(
        method=method,
        bits=bits,
        symmetric=symmetric,
        export={"format": form},
        calibration={"num_windows": 2, "window_size": 16},
    )
    if form == "compressed-tensors" and name.startswith("gpt2"):
        with pytest.raises(TargetError, match="Conv1D"):
            quantize(source, recipe, output)
        assert list(tmp_path.iterdir()) == []
        return
    result = quantize(source, recipe, output)
    expected = solved_weights(source, solutions)
    weights = decoded(output)
    assert (
        weights.keys()
        == expected.keys()
        == {info.name for info in model_linears(model_spec(CheckpointFolder.open(source)))}
    )
    for linear, weight in weights.items():
        assert torch.equal(weight.dequantize(), expected[linear])
        assert (weight.bits, weight.symmetric, weight.num_groups) == (bits, symmetric, 1)
    tokens_BS = random_tokens(2, 11)
    reference = with_weights(source, expected).logits(tokens_BS)
    for held in ("dense", "exact"):
        logits = load_model(output, weights=held).logits(tokens_BS)
        # The kernel of quantized linears adds in another order; the large random weights amplify that.
        torch.testing.assert_close(logits, reference, rtol=0, atol=2e-5 * float(reference.abs().max()))
    assert verify_folder(CheckpointFolder.open(output)).problems == ()
    assert [layer["name"] for layer in result.record["layers"]] == [
        name for problem, _ in solutions for name in problem.name.split(" + ")
    ]


def test_the_default_calibrates_on_text_of_the_model_itself(models: dict[str, Path], tmp_path: Path) -> None:
    calibration = CalibrationRecipe(num_windows=3, window_size=20, seed=5)
    assert calibration.source == "self"
    result = quantize(
        models["wide"], Recipe(weights=WeightRecipe(group_size=16), calibration=calibration), tmp_path / "out"
    )
    record = result.record["calibration"]
    assert (record["num_windows"], record["window_size"], record["num_tokens"]) == (3, 20, 60)
    assert "written by the model itself at temperature 1 with seed 5" in record["notes"][0]
    assert len(record["tokens_sha256"]) == 64
    assert [layer["index"] for layer in result.record["decoder_layers"]] == [0, 1]
    assert all(0 < layer["output_error"] < 1 for layer in result.record["decoder_layers"])


@pytest.mark.parametrize("export", [{"format": "gptq"}, {"format": "compressed-tensors", "max_shard_bytes": 30_000}])
def test_two_runs_write_the_same_bytes(export: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(group_size=16, bits=3, symmetric=False, solver_dtype="float32", export=export)
    folders = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        quantize(models["wide"], recipe, tmp_path / name / "out")
        folders.append(folder_bytes(tmp_path / name / "out"))
    assert folders[0] == folders[1]
    manifest = folders[0]["optgptq_manifest.json"].decode()
    assert str(tmp_path) not in manifest
    assert str(models["wide"]) not in manifest
    assert "seconds" not in manifest


def test_a_sharded_source_gives_the_tensors_of_a_whole_one(models: dict[str, Path], tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    recipe = tiny_recipe(group_size=16)
    whole = quantize(models["wide"], recipe, tmp_path / "whole").output
    source = CheckpointFolder.open(models["wide"])
    write_sharded(source, sharded)
    small = tiny_recipe(group_size=16, export={"max_shard_bytes": 40_000})
    parts = quantize(sharded, small, tmp_path / "parts").output
    first, second = CheckpointFolder.open(whole), CheckpointFolder.open(parts)
    assert len(CheckpointFolder.open(sharded).weight_files) > 2
    assert len(second.weight_files) > 1 == len(first.weight_files)
    assert (parts / "model.safetensors.index.json").is_file()
    assert (whole / "model.safetensors.index.json").is_file()
    assert first.tensors.keys() == second.tensors.keys()
    for name in first.tensors:
        assert torch.equal(first.read(name), second.read(name))
    tokens_BS = random_tokens(1, 9)
    assert torch.equal(load_model(whole).logits(tokens_BS), load_model(parts).logits(tokens_BS))


def write_sharded(
    source: CheckpointFolder, folder: Path, *, dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
) -> None:
    """Copy a model in small shards; `dtypes` changes linears by the last part of their name."""
    wanted = {name: dtypes.get(name.split(".")[-2], info.torch_dtype) for name, info in source.tensors.items()}
    entries = [TensorEntry(name, wanted[name], info.shape) for name, info in source.tensors.items()]
    writer = ShardWriter(folder, entries, max_shard_bytes=60_000)
    for name in source.tensors:
        writer.write(name, source.read(name).to(wanted[name]))
    writer.finish()
    for name in source.side_files:
        (folder / name).write_bytes((source.path / name).read_bytes())


@pytest.mark.parametrize("tiny", ["llama-tied", "falcon-untied", "gpt2-conv1d"])
def test_everything_that_is_not_quantized_stays_bit_for_bit(tiny: str, models: dict[str, Path], tmp_path: Path) -> None:
    (models[tiny] / "extra").mkdir(exist_ok=True)
    (models[tiny] / "extra" / "notes.txt").write_bytes(b"\x00\xffnotes")
    output = quantize(models[tiny], tiny_recipe(method="rtn"), tmp_path / "out").output
    source, written = CheckpointFolder.open(models[tiny]), CheckpointFolder.open(output)
    quantized = {f"{info.name}.weight" for info in model_linears(model_spec(source))}
    for name in source.tensors:
        if name in quantized:
            assert name not in written.tensors
        else:
            assert source.read(name).dtype == written.read(name).dtype
            assert torch.equal(source.read(name), written.read(name))
    for name in source.side_files:
        if name != "config.json":
            assert (output / name).read_bytes() == (models[tiny] / name).read_bytes()
    config = json.loads((output / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "gptq"
    assert config == json.loads((models[tiny] / "config.json").read_text())


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_rules_reach_the_file(
    form: str, models: dict[str, Path], solutions: list[tuple[LayerProblem, LayerSolution]], tmp_path: Path
) -> None:
    rules = (
        {"match": "down_proj", "bits": 8, "group_size": 32},
        {"match": r"layers\.1\.self_attn\.[qkv]_proj", "symmetric": False, "method": "rtn"},
    )
    recipe = tiny_recipe(
        group_size=16, keep_dense=(r"layers\.0\.self_attn\.o_proj",), rules=rules, export={"format": form}
    )
    result = quantize(models["wide"], recipe, tmp_path / "out")
    weights = decoded(tmp_path / "out")
    down, query = weights["model.layers.1.mlp.down_proj"], weights["model.layers.1.self_attn.q_proj"]
    assert (down.bits, down.group_size, down.symmetric) == (8, 32, True)
    assert (query.bits, query.group_size, query.symmetric) == (4, 16, False)
    assert "model.layers.0.self_attn.o_proj" not in weights
    assert len(weights) == 13
    reasons = {dense["name"]: dense["reason"] for dense in result.record["dense"]}
    assert "weights.keep_dense.0" in reasons["model.layers.0.self_attn.o_proj"]
    assert [name for name in reasons if ".layers." in name] == ["model.layers.0.self_attn.o_proj"]
    by_name = {layer["name"]: layer for layer in result.record["layers"]}
    assert by_name["model.layers.1.self_attn.q_proj"]["method"] == "rtn"
    assert "weights.rules.1" in by_name["model.layers.1.self_attn.q_proj"]["reason"]
    assert "reason" not in by_name["model.layers.0.self_attn.q_proj"]
    expected = solved_weights(models["wide"], solutions)
    for name, weight in weights.items():
        assert torch.equal(weight.dequantize(), expected[name])
    tokens_BS = random_tokens(2, 9)
    torch.testing.assert_close(
        load_model(tmp_path / "out").logits(tokens_BS), with_weights(models["wide"], expected).logits(tokens_BS)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_half_precision_models(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    source = write_model(wide_llama(), tmp_path / "model", dtype=dtype)
    recipe = tiny_recipe(group_size=16, bits=2, symmetric=True, export={"format": form})
    output = quantize(source, recipe, tmp_path / "out").output
    scale_dtype = torch.float16 if form == "gptq" else dtype
    weights = decoded(output)
    assert {weight.scale_OG.dtype for weight in weights.values()} == {scale_dtype}
    # Turned grids (negative scales) go through the file.
    assert any(bool((weight.scale_OG < 0).any()) for weight in weights.values())
    assert CheckpointFolder.open(output).info("model.embed_tokens.weight").torch_dtype == dtype


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_every_linear_keeps_scales_in_its_own_dtype(form: str, models: dict[str, Path], tmp_path: Path) -> None:
    dtypes = {"q_proj": torch.bfloat16, "down_proj": torch.float64}
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_sharded(CheckpointFolder.open(models["wide"]), folder, dtypes=dtypes)
    output = quantize(folder, tiny_recipe(group_size=16, export={"format": form}), tmp_path / "out").output
    for name, weight in decoded(output).items():
        expected = {"q_proj": torch.bfloat16}.get(name.rsplit(".", 1)[1], torch.float32)
        assert weight.scale_OG.dtype == (torch.float16 if form == "gptq" else expected)


def test_options_of_the_pipeline_all_run_and_are_recorded(models: dict[str, Path], tmp_path: Path) -> None:
    losses = {}
    runs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("plain", {}, {}),
        ("one-pass", {}, {"true_sequential": False}),
        ("dense-moments", {"moment_stream": "full_precision", "full_precision_windows": 0}, {}),
        ("float64", {"moment_dtype": "float64", "windows_per_batch": 1}, {}),
        ("no-reference", {"full_precision_windows": 0}, {}),
    ]
    for name, calibration, weights in runs:
        recipe = tiny_recipe(group_size=16, bits=3, calibration=calibration, **weights)
        result = quantize(models["wide"], recipe, tmp_path / name)
        losses[name] = [layer["loss"] for layer in result.record["layers"]]
        measured = [layer["output_error"] for layer in result.record["decoder_layers"]]
        assert all(error is None for error in measured) == (name == "no-reference")
        for section, changes in (("calibration", calibration), ("weights", weights)):
            for key, value in changes.items():
                assert result.record["recipe"][section][key] == value
    assert losses["no-reference"] == losses["plain"]
    assert losses["float64"] == pytest.approx(losses["plain"], rel=0.2)
    # q, k and v of the first layer read the same in all of them; what is behind them does not.
    assert losses["one-pass"][:3] == losses["dense-moments"][:3] == losses["plain"][:3]
    assert losses["one-pass"][3:] != losses["plain"][3:] != losses["dense-moments"][3:]


def test_events_tell_the_whole_job(models: dict[str, Path], tmp_path: Path) -> None:
    seen: list[events.ProgressEvent] = []
    recipe = tiny_recipe(group_size=16, keep_dense=("layers.1.self_attn.o_proj",))
    result = quantize(models["wide"], recipe, tmp_path / "out", progress=seen.append)
    started = seen[0]
    assert isinstance(started, events.JobStarted)
    assert (started.num_decoder_layers, started.num_linears) == (2, 14)
    linears = [event for event in seen if isinstance(event, events.LinearFinished)]
    assert len(linears) == 14
    (dense,) = [event for event in linears if event.bits is None]
    assert (dense.name, dense.loss, dense.rtn_loss) == ("model.layers.1.self_attn.o_proj", None, None)
    recorded = {layer["name"]: layer["loss"] for layer in result.record["layers"]}
    assert {event.name: event.loss for event in linears if event.bits} == recorded
    finished = [event for event in seen if isinstance(event, events.DecoderLayerFinished)]
    assert [event.index for event in finished] == [0, 1]
    assert finished[-1].peak_memory_bytes > 0
    warnings = tuple(event.message for event in seen if isinstance(event, events.WarningRaised))
    assert warnings == result.warnings
    stages = [event.stage for event in seen if isinstance(event, events.StageStarted)]
    assert stages == ["qkv", "o", "gate_up", "down"] * 2


def test_bits_per_weight_counts_codes_and_scales(models: dict[str, Path], tmp_path: Path) -> None:
    def bits(**options: Any) -> float:
        result: QuantizeResult = quantize(
            models["wide"], tiny_recipe(method="rtn", **options), tmp_path / "o", overwrite=True
        )
        return result.bits_per_weight

    compressed = {"export": {"format": "compressed-tensors"}}
    assert bits(group_size=16, bits=4, **compressed) == pytest.approx(4 + 32 / 16)
    assert bits(group_size=16, bits=3, symmetric=False, **compressed) == pytest.approx(3 + 35 / 16)
    assert bits(group_size=16, bits=4) == pytest.approx(4 + 20 / 16)


def test_raised_damping_becomes_a_warning(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = factor_moment

    def indefinite(moment_II: torch.Tensor, **settings: Any) -> Any:
        shift = 0.02 * float(moment_II.diagonal().mean()) + float(torch.linalg.eigvalsh(moment_II)[0])
        return factor(moment_II - shift * torch.eye(moment_II.shape[0]), **settings)

    monkeypatch.setattr("optgptq.solvers.factor.factor_moment", indefinite)
    result = quantize(models["wide"], tiny_recipe(group_size=16), tmp_path / "out")
    raised = [layer for layer in result.record["layers"] if layer["damp_ratio_used"] > 0.01]
    assert raised
    for layer in raised:
        assert f"{layer['name']}: {layer['notes'][0]}" in result.warnings
        assert layer["notes"][0].startswith("damping was raised from 0.01 to ")
    assert json.loads((tmp_path / "out" / "optgptq_manifest.json").read_text())["warnings"] == list(result.warnings)
