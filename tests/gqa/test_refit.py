"""The refit of the output projection against a literal least squares, and that it is taken only where it helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.grouped import some_windows
from support.tiny_models import TINY_MODELS
from support.transformed import saved

from optgptq.calibration.moments import InputMoment
from optgptq.calibration.stream import ActivationStream, embed
from optgptq.gqa.refit import Regression, refit_output
from optgptq.models.attention import attention_context
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear
from optgptq.models.loading import load_embedding, load_layer
from optgptq.models.registry import model_spec


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_regression_is_the_literal_one(with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs_TI = torch.randn(60, 5, generator=generator, dtype=torch.float64) + 0.7
    lacking_TM = torch.randn(60, 3, generator=generator, dtype=torch.float64) - 0.4
    moment = InputMoment(5, dtype=torch.float64)
    moment.add(inputs_TI)
    sums = Regression(
        moment=moment, cross_MI=lacking_TM.T @ inputs_TI, input_I=inputs_TI.sum(0), error_M=lacking_TM.sum(0)
    )
    change_MI, change_M = sums.solve(0.05, with_bias=with_bias)
    centred = inputs_TI - inputs_TI.mean(0) if with_bias else inputs_TI
    ridge = (0.05 * 60 * centred.square().mean(0).mean()).sqrt()
    ones = torch.ones(60, 1, dtype=torch.float64)
    columns = torch.cat([inputs_TI, ones], dim=1) if with_bias else inputs_TI
    penalty = torch.zeros(5, columns.shape[1], dtype=torch.float64)
    penalty[:, :5] = ridge * torch.eye(5, dtype=torch.float64)
    wanted = torch.cat([lacking_TM, torch.zeros(5, 3, dtype=torch.float64)])
    expected = torch.linalg.lstsq(torch.cat([columns, penalty]), wanted).solution.T
    torch.testing.assert_close(change_MI, expected[:, :5], rtol=1e-9, atol=1e-9)
    if change_M is None:
        assert not with_bias
    else:
        torch.testing.assert_close(change_M, expected[:, 5], rtol=1e-9, atol=1e-9)


def stage_o(folder: Path, name: str) -> tuple[tuple[ActivationStream, ActivationStream], DecoderLayer]:
    """Both streams of a tiny model before stage `o` of its first layer, 2 of 12 windows held out."""
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == name)
    source = saved(tiny, folder)
    spec, windows = model_spec(source), some_windows()
    layer = load_layer(source, spec, 0, dtype=torch.float64)
    embedding = load_embedding(source, spec, dtype=torch.float64)
    context = attention_context(spec, windows.window_size, dtype=torch.float64)
    first, second = (embed(windows, embedding, context, windows_per_batch=5, num_held_out=2) for _ in range(2))
    for stream in (first, second):
        stream.advance(layer, "qkv")
    return (first, second), layer


@pytest.mark.parametrize("name", ["llama-grouped_query", "falcon-rw_alibi", "gemma2-softcaps"])
def test_a_disturbed_projection_is_found_again(name: str, tmp_path: Path) -> None:
    streams, layer = stage_o(tmp_path / "model", name)
    local_name = layer.spec.stage("o").linears[0]
    linear = layer.linears[local_name]
    assert isinstance(linear, Linear)
    noise = 0.3 * torch.randn(linear.weight_OI.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    disturbed = replace(layer, linears={**layer.linears, local_name: Linear(linear.weight_OI + noise, linear.bias_O)})
    refit = refit_output(streams, (disturbed, layer), dtype=torch.float64)
    assert refit.linear is not None
    assert refit.error_after < 1e-3 * refit.error_before
    change = (refit.linear.weight_OI - linear.weight_OI).norm() / noise.norm()
    assert float(change) < 0.1


def test_nothing_is_changed_where_nothing_is_lacking(tmp_path: Path) -> None:
    streams, layer = stage_o(tmp_path / "model", "llama-grouped_query")
    refit = refit_output(streams, (layer, layer), dtype=torch.float64)
    assert refit.linear is None
    assert refit.error_after == refit.error_before == 0.0
