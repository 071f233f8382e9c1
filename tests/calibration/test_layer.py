"""The staged walk against the plain way: forward hooks on a transformers model, whole passes for every stage."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizable import padded_windows, recorded_inputs, tiny_model, tiny_recipe, wide_llama, write_model
from support.tiny_models import TinyModel, random_tokens, reference_logits, reference_model

from optgptq.calibration import stream as stream_module
from optgptq.calibration.layer import LayerCalibration, LayerSettings
from optgptq.calibration.stream import embed
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.windows import Windows, windows_from_tokens
from optgptq.errors import NumericalError
from optgptq.formats import format_named
from optgptq.models.attention import attention_context
from optgptq.models.decoder import load_decoder
from optgptq.models.loading import load_embedding, load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import STAGE_NAMES
from optgptq.plan import LinearPlan, plan_linears
from optgptq.recipe.records import Recipe
from optgptq.solvers import METHODS, LayerProblem, LayerSolution, SolverSettings

SOLVER = SolverSettings(dtype=torch.float64)


@dataclass
class Walk:
    """Outcome of the staged walk."""

    solutions: dict[str, LayerSolution]
    errors: list[float | None]
    stages: list[tuple[int, str]]
    calibration: LayerCalibration


def plans_of(folder: Path, recipe: Recipe) -> tuple[LinearPlan, ...]:
    return plan_linears(model_spec(CheckpointFolder.open(folder)), recipe, format_named("gptq_v2"))


def staged_walk(
    folder: Path,
    windows: Windows,
    recipe: Recipe,
    *,
    reference: int = 2,
    true_sequential: bool = True,
    measure_full_precision: bool = False,
    windows_per_batch: int | None = None,
    moment_dtype: torch.dtype = torch.float64,
) -> Walk:
    source = CheckpointFolder.open(folder)
    spec = model_spec(source)
    embedding = load_embedding(source, spec, dtype=torch.float32)
    context = attention_context(spec, windows.window_size)
    settings = LayerSettings(
        solver=SOLVER,
        moment_dtype=moment_dtype,
        true_sequential=true_sequential,
        measure_full_precision=measure_full_precision,
    )
    walk = Walk({}, [], [], None)  # type: ignore[arg-type]
    walk.calibration = calibration = LayerCalibration(
        embed(windows, embedding, context, windows_per_batch=windows_per_batch),
        embed(windows.first(reference), embedding, context, windows_per_batch=windows_per_batch) if reference else None,
        settings,
        stage_started=lambda index, stage: walk.stages.append((index, stage)),
    )
    plans = plans_of(folder, recipe)
    with torch.no_grad():
        for index in range(spec.num_layers):
            layer = load_layer(source, spec, index, dtype=torch.float32)
            for solved in calibration.run(layer, [plan for plan in plans if plan.info.layer_index == index]):
                if solved.solution is not None:
                    walk.solutions[solved.plan.info.name] = solved.solution
            walk.errors.append(calibration.output_error())
    return walk


def plain_walk(
    model: Any, plans: Sequence[LinearPlan], windows: Windows, *, true_sequential: bool, measure_full_precision: bool
) -> dict[str, LayerSolution]:
    """Run the whole model for every stage and record what its linears read; linears are solved one by one."""
    original = copy.deepcopy(model)
    solutions: dict[str, LayerSolution] = {}
    steps: list[list[LinearPlan]] = []
    for index in range(1 + max(plan.info.layer_index for plan in plans)):
        in_layer = [plan for plan in plans if plan.info.layer_index == index]
        by_stage = [[plan for plan in in_layer if plan.info.stage == stage] for stage in STAGE_NAMES]
        steps += by_stage if true_sequential else [in_layer]
    for step in steps:
        measured = original if measure_full_precision else model
        with recorded_inputs(measured, [plan.info.name for plan in step]) as inputs:
            for tokens_S, length in zip(windows.tokens_WS, windows.lengths_W.tolist(), strict=True):
                reference_logits(measured, tokens_S[None, :length])
        for plan in step:
            if plan.grid is None:
                continue
            inputs_TI = torch.cat(inputs[plan.info.name])
            weight = model.get_submodule(plan.info.name).weight
            weight_OI = weight.detach().t() if plan.info.stored_transposed else weight.detach()
            problem = LayerProblem(
                name=plan.info.name,
                weight_OI=weight_OI,
                input_moment_II=inputs_TI.T @ inputs_TI / inputs_TI.shape[0],
                num_tokens=inputs_TI.shape[0],
                grid=plan.grid,
                settings=SOLVER,
            )
            solutions[plan.info.name] = solution = METHODS[plan.method].solver(problem)
            solved_OI = solution.weight.dequantize()
            with torch.no_grad():
                weight.copy_(solved_OI.t() if plan.info.stored_transposed else solved_OI)
    return solutions


def assert_same(found: dict[str, LayerSolution], expected: dict[str, LayerSolution]) -> None:
    """Codes may differ where float32 activations put a weight on the other side of a middle: rarely."""
    assert list(found) == list(expected)
    differing = total = 0
    for name, solution in found.items():
        differing += int((solution.weight.codes_OI != expected[name].weight.codes_OI).sum())
        total += solution.weight.codes_OI.numel()
        torch.testing.assert_close(solution.row_energy_O, expected[name].row_energy_O, rtol=2e-3, atol=1e-6)
        assert solution.loss == pytest.approx(expected[name].loss, rel=2e-2)
    assert differing <= 0.002 * total


MODELS = (
    "llama-grouped_query",
    "qwen3-norms",
    "gemma2-softcaps",
    "phi3-longrope",
    "gpt2-conv1d",
    "gptneox-parallel",
    "opt-post_norm_projected",
    "falcon-multi_query",
)


def windows_for(tiny: TinyModel) -> Windows:
    tokens_WS = random_tokens(5, 20, vocab_size=tiny.values["vocab_size"], seed=3)
    return padded_windows(tokens_WS, [20, 7, 20, 1, 13])


@pytest.mark.parametrize("name", MODELS)
def test_the_staged_walk_is_the_plain_one(name: str, tmp_path: Path) -> None:
    tiny = tiny_model(name)
    folder, windows = write_model(tiny, tmp_path / "model"), windows_for(tiny)
    recipe = tiny_recipe(bits=3, grid_search="mse")
    walk = staged_walk(folder, windows, recipe, windows_per_batch=2)
    expected = plain_walk(
        reference_model(tiny),
        plans_of(folder, recipe),
        windows,
        true_sequential=True,
        measure_full_precision=False,
    )
    assert_same(walk.solutions, expected)
    assert walk.stages == [(index, stage) for index in range(len(walk.errors)) for stage in STAGE_NAMES]


@pytest.mark.parametrize(("true_sequential", "full_precision"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("name", ["gptneox-parallel"])
def test_one_pass_and_full_precision_moments_are_the_plain_ones(
    name: str, true_sequential: bool, full_precision: bool, tmp_path: Path
) -> None:
    tiny = tiny_model(name)
    folder, windows = write_model(tiny, tmp_path / "model"), windows_for(tiny)
    recipe = tiny_recipe(bits=3, grid_search="mse")
    walk = staged_walk(
        folder,
        windows,
        recipe,
        reference=5 if full_precision else 0,
        true_sequential=true_sequential,
        measure_full_precision=full_precision,
    )
    expected = plain_walk(
        reference_model(tiny),
        plans_of(folder, recipe),
        windows,
        true_sequential=true_sequential,
        measure_full_precision=full_precision,
    )
    assert_same(walk.solutions, expected)


def test_rules_split_a_stage_into_solves_of_their_own(tmp_path: Path) -> None:
    tiny = wide_llama()
    folder, windows = write_model(tiny, tmp_path / "model"), windows_for(tiny)
    recipe = tiny_recipe(
        bits=3,
        group_size=16,
        grid_search="mse",
        keep_dense=("layers.0.self_attn.[qkv]_proj",),
        rules=({"match": "up_proj", "method": "rtn"}, {"match": "layers.1.self_attn.o_proj", "bits": 8}),
    )
    plans = plans_of(folder, recipe)
    found = staged_walk(folder, windows, recipe).solutions
    expected = plain_walk(reference_model(tiny), plans, windows, true_sequential=True, measure_full_precision=False)
    assert {name: solution.weight.bits for name, solution in found.items()} == {
        plan.info.name: plan.layout.bits for plan in plans if plan.grid is not None
    }
    assert_same({name: found[name] for name in expected}, expected)
    assert len(found) == 14 - 3


@pytest.mark.parametrize("full_precision", [False, True])
def test_kept_inputs_do_not_change_the_result(
    full_precision: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_model("llama-grouped_query")
    folder, windows = write_model(tiny, tmp_path / "model"), windows_for(tiny)
    walks = []
    # Nothing kept, some batches kept, all kept.
    for kept_bytes in (0, 2 * 20 * 38 * 4, 2**30):
        monkeypatch.setattr(stream_module, "KEPT_BYTES", kept_bytes)
        walks.append(
            staged_walk(
                folder,
                windows,
                tiny_recipe(bits=3),
                reference=5,
                measure_full_precision=full_precision,
                windows_per_batch=2,
            )
        )
    for walk in walks[1:]:
        assert walk.errors == walks[0].errors
        for name, solution in walk.solutions.items():
            assert torch.equal(solution.weight.codes_OI, walks[0].solutions[name].weight.codes_OI)
            assert solution.loss == walks[0].solutions[name].loss


def test_the_size_of_batches_does_not_change_the_result(tmp_path: Path) -> None:
    tiny = tiny_model("llama-grouped_query")
    folder, windows = write_model(tiny, tmp_path / "model"), windows_for(tiny)
    recipe = tiny_recipe(bits=3, grid_search="mse")
    one, all_of_them = (staged_walk(folder, windows, recipe, windows_per_batch=size) for size in (1, None))
    assert len(one.calibration.quantized.batches) == 5
    assert len(all_of_them.calibration.quantized.batches) == 1
    assert_same(one.solutions, all_of_them.solutions)


def test_both_streams_end_at_the_hidden_states_of_their_models(tmp_path: Path) -> None:
    tiny = tiny_model("llama-grouped_query")
    folder = write_model(tiny, tmp_path / "model")
    windows = windows_from_tokens(random_tokens(3, 16, vocab_size=258))
    walk = staged_walk(folder, windows, tiny_recipe(bits=3), reference=2)
    source = CheckpointFolder.open(folder)
    original, quantized = load_decoder(source), load_decoder(source)
    for layer in quantized.layers:
        for name, linear in layer.linears.items():
            linear.weight_OI = walk.solutions[f"model.layers.{layer.index}.{name}"].weight.dequantize()  # type: ignore[attr-defined]
    expected, found = original.hidden(windows.tokens_WS[:2]), quantized.hidden(windows.tokens_WS)
    assert walk.calibration.full_precision is not None
    torch.testing.assert_close(walk.calibration.full_precision.batches[0].state.hidden_BSM, expected)
    torch.testing.assert_close(walk.calibration.quantized.batches[0].state.hidden_BSM, found, rtol=1e-4, atol=1e-4)
    error = float((found[:2] - expected).square().sum() / expected.square().sum())
    assert walk.errors[-1] == pytest.approx(error, rel=1e-4)
    assert walk.errors[-1] is not None
    assert 0 < walk.errors[-1] < 1


def test_without_a_full_precision_stream_there_is_no_output_error(tmp_path: Path) -> None:
    tiny = tiny_model("llama-grouped_query")
    folder = write_model(tiny, tmp_path / "model")
    assert staged_walk(folder, windows_for(tiny), tiny_recipe(method="rtn"), reference=0).errors == [None] * 3


@pytest.mark.parametrize(("true_sequential", "windows_per_batch"), [(True, 1), (True, None), (False, 2)])
def test_values_that_are_not_finite_name_the_first_linear_and_window(
    true_sequential: bool, windows_per_batch: int | None, tmp_path: Path
) -> None:
    """Token 9 alone has a first feature, and the norm in front of attention blows that up beyond float32."""
    tiny = tiny_model("llama-grouped_query")
    model = reference_model(tiny)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[9, 0] = 1
        model.model.layers[0].input_layernorm.weight[0] = 1e30
    folder = write_model(tiny, tmp_path / "model")
    model.save_pretrained(folder)
    tokens_WS = random_tokens(4, 12, vocab_size=258).clamp(min=10)
    windows = padded_windows(tokens_WS, [12, 12, 12, 12])
    windows.tokens_WS[2, 5] = 9
    windows.tokens_WS[3, 1] = 9
    with pytest.raises(NumericalError) as caught:
        staged_walk(
            folder,
            windows,
            tiny_recipe(),
            reference=0,
            true_sequential=true_sequential,
            windows_per_batch=windows_per_batch,
            moment_dtype=torch.float32,
        )
    assert caught.value.where == "input of model.layers.0.self_attn.q_proj, calibration window 2"
    assert caught.value.exit_code == 6


def test_an_overflow_inside_attention_names_the_linear_behind_it(tmp_path: Path) -> None:
    tiny = tiny_model("llama-grouped_query")
    model = reference_model(tiny)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[9, 0] = 1
        model.model.layers[0].self_attn.v_proj.weight[:, 0] = 1e38
    folder = write_model(tiny, tmp_path / "model")
    model.save_pretrained(folder)
    windows = windows_from_tokens(random_tokens(4, 12, vocab_size=258).clamp(min=10))
    windows.tokens_WS[1, 4] = 9
    # The quantized weight no longer overflows: its scale ends at the largest that can be stored.
    with pytest.raises(NumericalError, match=r"input of model\.layers\.0\.self_attn\.o_proj, calibration window 1"):
        staged_walk(folder, windows, tiny_recipe(), reference=0, true_sequential=False, moment_dtype=torch.float32)


def test_padding_that_is_not_finite_stops_nothing(tmp_path: Path) -> None:
    tiny = tiny_model("llama-grouped_query")
    model = reference_model(tiny)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1e25
    folder = write_model(tiny, tmp_path / "model")
    model.save_pretrained(folder)
    windows = padded_windows(random_tokens(3, 12, vocab_size=258), [12, 5, 9])
    walk = staged_walk(folder, windows, tiny_recipe(bits=3, grid_search="mse"))
    assert all(error is not None and error < 1 for error in walk.errors)
    assert all(solution.loss < 1 for solution in walk.solutions.values())
