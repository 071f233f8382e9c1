"""The main job with every part of the attention-aware recipes on: every family, and what cannot be done as asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizable import tiny_model, tiny_recipe, wide_llama, write_model
from support.transformed import REFUSED

from optgptq.bundled import bundled_path
from optgptq.calibration.targets import Target, shifted_by_moments, shifted_targets
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import ModelError, RecipeError
from optgptq.formats.verify import verify_folder
from optgptq.models.inventory import model_linears
from optgptq.models.registry import model_spec
from optgptq.quantize import QuantizeResult, quantize
from optgptq.recipe.loading import load_recipe
from optgptq.recipe.records import AttentionRecipe, Recipe, TransformRecipe
from optgptq.solvers import METHODS, LayerProblem, LayerSolution

EVERYTHING: dict[str, Any] = {
    "method": "attention_aware",
    "bits": 3,
    "target_shift": "exact",
    "scale_refit": True,
    "code_sweeps": 1,
    "solver_dtype": "float32",
    "export": {"format": "gptq_v2"},
}
WINDOWS: dict[str, Any] = {"num_windows": 6, "window_size": 16}
SEEN = {"values": True, "value_rows": True, "value_share": 0.5}
# One of every way in which attention, norms, residuals and fused weights are made.
FAMILIES = (
    "llama-grouped_query",
    "llama-multi_query",
    "llama-multi_head_biases",
    "llama-rope_yarn_scales",
    "mistral-short_window",
    "qwen2-late_window",
    "qwen3-norms",
    "gemma-multi_query",
    "gemma2-softcaps",
    "gemma3text-local_global",
    "phi3-longrope",
    "gpt2-conv1d",
    "gptneox-parallel",
    "opt-pre_norm",
    "opt-post_norm_projected",
    "bloom-residual_after_norm",
    "mpt-six_heads_clipped",
    "falcon-rw_alibi",
    "falcon-multi_query",
    "falcon-grouped",
)
POOLED = ("mistral-short_window", "qwen3-norms", "phi3-longrope", "gptneox-parallel", "falcon-grouped", "mpt-alibi")


def aware_recipe(
    rows: Any = "softmax",
    *,
    rotation: Any = "none",
    calibration: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
    **weights: Any,
) -> Recipe:
    """Return a recipe with every part on but for rotations; six windows of 16 tokens."""
    plain = tiny_recipe(calibration={**WINDOWS, **(calibration or {})}, **{**EVERYTHING, **weights})
    return Recipe(
        weights=plain.weights,
        attention=AttentionRecipe(**{"rows": rows, **SEEN, **(attention or {})}),
        transform=TransformRecipe(residual_rotation=rotation, value_rotation=rotation, seed=3),
        calibration=plain.calibration,
        export=plain.export,
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
def problems(monkeypatch: pytest.MonkeyPatch) -> list[LayerProblem]:
    """Every problem that a solver is given while the job runs."""
    seen: list[LayerProblem] = []

    def recording(solver: Any) -> Any:
        def solve(problem: LayerProblem) -> LayerSolution:
            seen.append(problem)
            solution: LayerSolution = solver(problem)
            return solution

        return solve

    recorded = {name: replace(method, solver=recording(method.solver)) for name, method in METHODS.items()}
    monkeypatch.setattr("optgptq.calibration.layer.METHODS", recorded)
    return seen


def is_whole(result: QuantizeResult, model: Path) -> None:
    """Check that all linears are quantized, shifted by a share, and read back as they were solved."""
    names = [info.name for info in model_linears(model_spec(CheckpointFolder.open(model)))]
    layers = result.record["layers"]
    assert sorted(layer["name"] for layer in layers) == sorted(names)
    assert all(layer["method"] == "attention_aware" for layer in layers)
    assert all(0 <= layer["shift_strength"] <= 1 for layer in layers)
    assert all(0 <= layer["loss"] < 1 for layer in layers)
    assert all(0 < layer["output_error"] < 1 for layer in result.record["decoder_layers"])
    assert verify_folder(CheckpointFolder.open(result.output)).problems == ()


def rows_of(problem: LayerProblem) -> int:
    return len(problem.weight_OI)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_with_every_part(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    rotation = "none" if name in REFUSED["everything"] else "hadamard"
    result = quantize(models[name], aware_recipe(rotation=rotation), tmp_path / "out")
    is_whole(result, models[name])


@pytest.mark.parametrize("name", POOLED)
def test_pooled_rows_in_every_layout(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    result = quantize(models[name], aware_recipe("pooled"), tmp_path / "out")
    is_whole(result, models[name])
    alone = [warning for warning in result.warnings if "solved one-sided: " in warning]
    if name == "mistral-short_window":
        assert alone
        assert "sees 5 keys, fewer than half of the 16 positions" in alone[0]
    else:
        assert not any("sees" in warning or "subtract a mean" in warning for warning in alone)


@pytest.mark.parametrize("name", ["gptneox-parallel", "falcon-grouped", "phi3-longrope", "wide"])
def test_queries_keys_and_values_are_solved_apart(
    name: str, models: dict[str, Path], problems: list[LayerProblem], tmp_path: Path
) -> None:
    """Fused or not: queries and keys each on their own rows, each value head on its own moment."""
    quantize(models[name], aware_recipe(), tmp_path / "out")
    spec = model_spec(CheckpointFolder.open(models[name]))
    query, key = (
        next(given for given in problems if rows_of(given) == count * spec.head_dim)
        for count in (spec.num_heads, spec.num_kv_heads)
    )
    values = [given for given in problems if "value head" in given.name]
    assert [given.name.rsplit(": ", 1)[1] for given in values] == [
        f"value head {head}" for head in range(spec.num_kv_heads)
    ] * spec.num_layers
    for given in values:
        assert given.weight_OI.shape == (spec.head_dim, spec.hidden_size)
        assert given.output_moment_NDD is not None
        assert given.output_moment_NDD.shape == (1, spec.head_dim, spec.head_dim)
        assert not torch.equal(given.input_moment_II, query.input_moment_II)
    for given, count in ((query, spec.num_heads), (key, spec.num_kv_heads)):
        assert given.output_moment_NDD is not None
        assert given.output_moment_NDD.shape == (count, spec.head_dim, spec.head_dim)


@pytest.mark.parametrize(("name", "linear"), [("wide", "v_proj"), ("gptneox-parallel", "query_key_value")])
def test_the_record_tells_how_far_value_heads_were_shifted(
    name: str, linear: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: dict[str, list[Any]] = {"heads": [], "stages": []}

    def of_head(*arguments: Any, **options: Any) -> Target:
        target = shifted_by_moments(*arguments, **options)
        found["heads"].append(target.shift_strength)
        return target

    def of_stage(dense: Any, *arguments: Any) -> dict[str, Target]:
        targets = shifted_targets(dense, *arguments)
        found["stages"] += [target.shift_strength for name, target in targets.items() if linear in name]
        return targets

    monkeypatch.setattr("optgptq.calibration.attention_stage.shifted_by_moments", of_head)
    monkeypatch.setattr("optgptq.calibration.layer.shifted_targets", of_stage)
    result = quantize(models[name], aware_recipe(), tmp_path / "out")
    strengths = [layer["shift_strength"] for layer in result.record["layers"] if linear in layer["name"]]
    num_heads = len(found["heads"]) // 2
    for index, strength in enumerate(strengths):
        mean = sum(found["heads"][index * num_heads : (index + 1) * num_heads]) / num_heads
        # A third of a fused linear's rows are values, of as many heads as there are queries.
        expected = mean if linear == "v_proj" else (mean + 2 * found["stages"][index]) / 3
        assert strength == pytest.approx(expected, abs=1e-12)


def test_two_runs_write_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    folders = []
    for name in ("first", "second"):
        output = quantize(models["wide"], aware_recipe(group_size=16, rotation="random"), tmp_path / name).output
        folders.append({path.name: path.read_bytes() for path in sorted(output.iterdir())})
    assert folders[0] == folders[1]


@pytest.mark.parametrize("num_windows", [1, 3])
def test_too_few_windows_to_hold_one_out(num_windows: int, models: dict[str, Path], tmp_path: Path) -> None:
    calibration = {"num_windows": num_windows}
    with pytest.raises(RecipeError) as caught:
        quantize(models["wide"], aware_recipe(calibration=calibration), tmp_path / "out")
    assert caught.value.where == "weights.shift_strength"
    assert caught.value.expected.startswith("at least 4 calibration windows")
    assert caught.value.found == str(num_windows)
    assert "weights.shift_strength to a number" in caught.value.action
    assert list(tmp_path.iterdir()) == []
    result = quantize(models["wide"], aware_recipe(calibration=calibration, shift_strength=0.5), tmp_path / "out")
    assert {layer["shift_strength"] for layer in result.record["layers"]} == {0.5}


def test_a_shift_needs_the_sequential_order_and_the_quantized_stream() -> None:
    wrong = {"weights.true_sequential": "false", "calibration.moment_stream": "full_precision"}
    for field, value in wrong.items():
        with pytest.raises(RecipeError, match="where targets are shifted") as caught:
            load_recipe("attention-aware-w4", [f"{field}={value}"])
        assert field in caught.value.where
        assert caught.value.exit_code == 2
        assert "target_shift exact" in caught.value.found


def test_without_a_shift_no_window_is_held_out(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = aware_recipe(target_shift="off", calibration={"num_windows": 2})
    result = quantize(models["wide"], recipe, tmp_path / "out")
    assert not any("shift_strength" in layer for layer in result.record["layers"])


@pytest.mark.parametrize(
    "weights",
    [
        {"keep_dense": (r"self_attn\.[qkv]_proj",)},
        {"rules": ({"match": r"layers\.\d\.self_attn\.k_proj", "method": "gptq"},)},
        {"rules": ({"match": r"self_attn\.[qkv]_proj", "method": "rtn"},)},
    ],
    ids=["dense", "mixed", "rounded"],
)
def test_stages_that_are_not_wholly_attention_aware_are_solved_as_ever(
    weights: dict[str, Any], models: dict[str, Path], problems: list[LayerProblem], tmp_path: Path
) -> None:
    result = quantize(models["wide"], aware_recipe(**weights), tmp_path / "out")
    assert all(given.output_moment_NDD is None for given in problems)
    assert not any("value head" in given.name for given in problems)
    asked = [layer for layer in result.record["layers"] if layer["method"] == "attention_aware"]
    unseen = {layer["name"] for layer in asked if any("without attention" in note for note in layer["notes"])}
    assert unseen == {layer["name"] for layer in asked if layer["name"].endswith(("q_proj", "k_proj", "v_proj"))}
    assert len(result.record["layers"]) == (8 if "keep_dense" in weights else 14)
    assert verify_folder(CheckpointFolder.open(result.output)).problems == ()


@pytest.mark.parametrize("value_rows", [False, True])
def test_attention_without_any_of_its_parts_is_plain_gptq(
    value_rows: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    attention = {"values": False, "value_rows": value_rows}
    weights = {"target_shift": "off", "scale_refit": False, "code_sweeps": 0, "solver_dtype": "float64"}
    decoded = []
    for method in ("attention_aware", "gptq"):
        recipe = aware_recipe("off", attention=attention, method=method, **weights)
        output = quantize(models["wide"], recipe, tmp_path / method).output
        folder = CheckpointFolder.open(output)
        decoded.append({name: folder.read(name) for name in folder.tensors})
    assert decoded[0].keys() == decoded[1].keys()
    for name, tensor in decoded[0].items():
        assert torch.equal(tensor, decoded[1][name])


def test_a_rotation_that_a_family_refuses_is_an_error(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="residual_rotation"):
        quantize(models["bloom-six_heads"], aware_recipe(rotation="hadamard"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_padding_is_in_no_moment_and_no_drift(
    models: dict[str, Path], problems: list[LayerProblem], tmp_path: Path
) -> None:
    """Documents of different lengths, one to a window: whatever stands in the padding changes nothing."""
    text = tmp_path / "text.jsonl"
    lengths = (16, 9, 12, 16, 5, 14)
    text.write_text("".join(json.dumps({"text": "once upon a time"[:length]}) + "\n" for length in lengths))
    calibration = {"source": str(text), "layout": "documents"}
    result = quantize(models["wide"], aware_recipe(calibration=calibration), tmp_path / "out")
    is_whole(result, models["wide"])
    measured = {given.num_tokens for given in problems if "o_proj" in given.name}
    assert result.record["calibration"]["num_tokens"] == sum(lengths)
    # One of six windows is held out.
    assert measured <= {sum(lengths) - length for length in lengths}
    assert len(measured) == 1


def test_the_bundled_model_comes_closer_to_itself_with_the_shift_and_with_every_part(tmp_path: Path) -> None:
    """The hidden states behind the last decoder layer, on windows of which two were in no moment."""
    text = {"source": "bundled:story-calibration", "num_windows": 8, "window_size": 128, "full_precision_windows": 8}
    plain = {"method": "gptq", "target_shift": "off", "scale_refit": False, "code_sweeps": 0}
    errors = {}
    for name, weights in (("plain", plain), ("shift", {**plain, "target_shift": "exact"}), ("everything", {})):
        recipe = aware_recipe(calibration=text, **{**weights, "bits": 2, "group_size": 64})
        result = quantize(bundled_path("story-llama"), recipe, tmp_path / name)
        errors[name] = result.record["decoder_layers"][-1]["output_error"]
    assert errors["shift"] < 0.8 * errors["plain"]
    assert errors["everything"] < errors["shift"]
