"""The output head's solve beside the paper's walk in float64, on moments summed token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.quantizable import padded_windows, tiny_model, tiny_recipe, write_model
from support.slow_gptq import slow_gptq, slow_order
from support.tiny_models import random_tokens

from optgptq.calibration.head import solve_head, solve_in_parts
from optgptq.calibration.layer import SolvedLinear
from optgptq.calibration.start import layer_settings
from optgptq.calibration.stream import ActivationStream, embed
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.formats import format_named
from optgptq.models.attention import attention_context
from optgptq.models.ends import Head
from optgptq.models.linear import Linear
from optgptq.models.loading import load_embedding, load_head, load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import STAGE_NAMES
from optgptq.plan import LinearPlan, plan_head
from optgptq.recipe.head import HeadRecipe
from optgptq.recipe.records import Recipe
from optgptq.solvers import LayerProblem, SolverSettings

LENGTHS = [7, 7, 4, 7, 6]


def recipe_of(**head: object) -> Recipe:
    recipe = tiny_recipe(calibration={"moment_dtype": "float64"}, grid_search="minmax")
    return recipe.model_copy(update={"head": HeadRecipe.model_validate(head)})


@pytest.fixture(scope="module", params=["llama-grouped_query", "opt-pre_norm_projected", "gemma2-softcaps"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    path = tmp_path_factory.mktemp("model") / "model"
    return CheckpointFolder.open(write_model(tiny_model(request.param), path))


def last_stream(folder: CheckpointFolder, *, num_held_out: int) -> ActivationStream:
    """Return windows of several lengths behind the last decoder layer, in float64."""
    spec = model_spec(folder)
    windows = padded_windows(random_tokens(5, 7, vocab_size=258), LENGTHS)
    stream = embed(
        windows,
        load_embedding(folder, spec, dtype=torch.float64),
        attention_context(spec, windows.window_size, dtype=torch.float64),
        windows_per_batch=2,
        num_held_out=num_held_out,
    )
    for index in range(spec.num_layers):
        layer = load_layer(folder, spec, index, dtype=torch.float64)
        for stage in STAGE_NAMES:
            stream.advance(layer, stage)
    return stream


def slow_moment(stream: ActivationStream, head: Head, lengths: list[int]) -> torch.Tensor:
    """Return the mean of `x x^T` over the tokens that count, one after the other, in float64."""
    hidden_WSM = torch.cat([batch.state.hidden_BSM for batch in stream.batches])
    tokens = [hidden_WSM[window, place] for window, length in enumerate(lengths) for place in range(length)]
    size = len(head.project.weight_OI[0]) if isinstance(head.project, Linear) else 0
    total_EE = torch.zeros(size, size, dtype=torch.float64)
    for token_M in tokens:
        read_E = token_M if head.norm is None else head.norm(token_M)
        if head.project_out_EM is not None:
            read_E = head.project_out_EM @ read_E
        total_EE += torch.outer(read_E, read_E)
    return total_EE / len(tokens)


def planned(folder: CheckpointFolder, recipe: Recipe) -> LinearPlan:
    plan = plan_head(model_spec(folder), recipe, format_named("compressed-tensors"))
    assert plan is not None
    return plan


def solved_by(folder: CheckpointFolder, recipe: Recipe, stream: ActivationStream) -> SolvedLinear:
    head = load_head(folder, model_spec(folder), dtype=torch.float64)
    return solve_head(head, planned(folder, recipe), stream, layer_settings(recipe, folder))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_the_slow_walk(folder: CheckpointFolder, bits: int, symmetric: bool) -> None:
    recipe = recipe_of(bits=bits, symmetric=symmetric)
    stream = last_stream(folder, num_held_out=1)
    found = solved_by(folder, recipe, stream)
    head = load_head(folder, model_spec(folder), dtype=torch.float64)
    # The last window is held out.
    moment_EE = slow_moment(stream, head, LENGTHS[:-1])
    assert isinstance(head.project, Linear)
    weight_VE = head.project.weight_OI
    order = slow_order(moment_EE, "group_aware", group_size=-1)
    slow = slow_gptq(weight_VE, moment_EE, bits=bits, symmetric=symmetric, group_size=-1, order=order)
    assert found.num_tokens == sum(LENGTHS[:-1])
    assert found.solution is not None
    weight = found.solution.weight
    assert torch.equal(next(weight.digest_parts()), slow.codes_OI)
    error_VE = weight.dequantize(torch.float64) - weight_VE
    loss = float(((error_VE @ moment_EE) * error_VE).sum() / ((weight_VE @ moment_EE) * weight_VE).sum())
    assert found.solution.loss == pytest.approx(loss, rel=1e-6)


def test_rounding_is_to_the_nearest(folder: CheckpointFolder) -> None:
    found = solved_by(folder, recipe_of(bits=4, method="rtn"), last_stream(folder, num_held_out=0))
    head = load_head(folder, model_spec(folder), dtype=torch.float64)
    assert found.solution is not None
    assert isinstance(head.project, Linear)
    weight_VE = found.solution.weight.dequantize(torch.float64)
    scale_V = 2 * head.project.weight_OI.abs().amax(dim=1) / 15
    # Scales are rounded for storage; half a step is the most that rounding moves, but where the grid ends.
    assert bool(((weight_VE - head.project.weight_OI).abs() <= 1.01 * scale_V[:, None]).all())
    assert found.solution.loss == found.solution.rtn_loss


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_parts_make_the_whole(folder: CheckpointFolder, method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs_TI = torch.randn(200, 48, generator=generator)
    weight_OI = torch.randn(61, 48, generator=generator)
    recipe = recipe_of(bits=4, method=method, group_size=16)
    spec = replace(model_spec(folder), vocab_size=61, embedding_size=48)
    plan = plan_head(spec, recipe, format_named("gptq"))
    assert plan is not None
    assert plan.grid is not None
    problem = LayerProblem(
        name="lm_head",
        weight_OI=weight_OI,
        input_moment_II=inputs_TI.T @ inputs_TI / 200,
        num_tokens=200,
        grid=plan.grid,
        settings=SolverSettings(dtype=torch.float64, scale_refit=True, code_sweeps=2),
    )
    whole, parts = (solve_in_parts(problem, method=method, num_rows=number) for number in (61, 16))
    for ours, theirs in zip(parts.weight.digest_parts(), whole.weight.digest_parts(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.allclose(parts.row_loss_O, whole.row_loss_O, rtol=1e-9)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-9)
    assert parts.rtn_loss == pytest.approx(whole.rtn_loss, rel=1e-9)
    assert len(parts.row_clipped_O) == len(parts.row_energy_O) == len(parts.row_rtn_loss_O) == 61


def test_a_head_that_stays_dense_is_not_solved(folder: CheckpointFolder) -> None:
    plan = replace(planned(folder, recipe_of(bits=8)), grid=None)
    head = load_head(folder, model_spec(folder), dtype=torch.float64)
    with pytest.raises(TypeError, match="not to be quantized"):
        solve_head(head, plan, last_stream(folder, num_held_out=0), layer_settings(recipe_of(bits=8), folder))
