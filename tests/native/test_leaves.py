"""The compiled leaves against float64, on every path; the same bits for every number of rows and threads."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from support.native_paths import native_paths
from torch.nn import functional as F  # noqa: N812

from optgptq.models.activations import ACTIVATIONS
from optgptq.models.norm import Norm
from optgptq.models.spec import NormSpec
from optgptq.native.leaves import (
    GATED_KINDS,
    SumNorm,
    draw,
    gated,
    greatest,
    joint_gated,
    takes_activations,
    takes_leaves,
)
from optgptq.native.library import load_library

pytestmark = pytest.mark.skipif(load_library() is None, reason="the native library was not built")

# Half a step of the type, and what float32 loses on the way.
ERRORS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(ERRORS)
SHAPES = [(3, 5, 77), (1, 1), (2, 16), (1, 1, 2048), (130, 128)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_is_that_of_the_rounded_sum(path, dtype, shape, weight_dtype) -> None:
    x, residual = numbers(shape, dtype), numbers(shape, dtype, seed=1)
    weight = None if weight_dtype is None else (1 + numbers(shape[-1:], torch.float32, seed=2)).to(weight_dtype)
    norm = SumNorm(weight, shape[-1], 1e-5, path=path)
    double = None if weight is None else weight.double()
    expected = F.rms_norm(x.double(), shape[-1:], double, 1e-5)
    before = x.clone()
    torch.testing.assert_close(norm(x).double(), expected, rtol=ERRORS[dtype], atol=1e-6)
    assert torch.equal(x, before)
    found = norm(x, residual)
    assert torch.equal(x, before + residual)
    expected = F.rms_norm(x.double(), shape[-1:], double, 1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=ERRORS[dtype], atol=1e-6)
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype) -> None:
    x = torch.ones(3, 40, dtype=dtype)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    found = SumNorm(None, 40, 1e-6)(x)
    assert bool(found[0].isnan().all())
    assert bool(found[1, 3].isnan())
    assert bool(found[2].isfinite().all())
    gates = gated(x, torch.ones_like(x), "silu")
    assert bool(gates[0, 3].isnan())
    assert bool(gates[1, 3].isinf())
    assert gates.isfinite().sum() == gates.numel() - 2


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATED_KINDS)
def test_gates_are_those_of_the_activations(path, dtype, kind) -> None:
    joint = numbers((2, 3, 2 * 83), dtype)
    joint[0, 0, :4] = torch.tensor([-90.0, 90.0, 0.0, -0.0])
    gate, up = joint.chunk(2, -1)
    expected = ACTIVATIONS[kind](gate.double()) * up.double()
    # Of a tangent near -1 little is left in float32.
    tolerances = {"rtol": max(2e-6, ERRORS[dtype]), "atol": 1e-5 if "gelu" in kind else 1e-7}
    found = gated(gate, up, kind, path=path)
    torch.testing.assert_close(found.double(), expected, **tolerances)
    assert found.dtype == dtype
    assert torch.equal(joint_gated(joint, kind, path=path), found)


def test_gates_whose_rows_are_apart() -> None:
    wide = numbers((4, 5, 300), torch.float32)
    gate, up = wide[..., 10:80], wide[..., 110:180]
    expected = F.silu(gate) * up
    torch.testing.assert_close(gated(gate, up, "silu"), expected)
    torch.testing.assert_close(gated(gate.contiguous(), up, "silu"), expected)
    with pytest.raises(AssertionError):
        gated(wide.transpose(0, 1), wide.transpose(0, 1), "silu")


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 64, 1001])
def test_the_greatest_is_that_of_argmax(path, size) -> None:
    logits = numbers((7, size), torch.float32, seed=size)
    logits[1, size // 2] = math.inf
    logits[2, size // 3] = math.nan
    logits[3, size // 2], logits[3, size - 1] = math.nan, math.nan
    logits[4] = 1.0
    logits[5] = -math.inf
    logits[6, size // 2 :] = logits[6].max() + 1
    assert torch.equal(greatest(logits, path=path), logits.argmax(-1))


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize(("size", "spread"), [(1, 1.0), (2, 1.0), (17, 3.0), (1001, 1.0), (1001, 40.0), (4096, 0.0)])
def test_a_draw_is_that_of_the_literal_distribution(path, size, spread) -> None:
    logits = spread * numbers((64, size), torch.float32, seed=size)
    best_B = logits.max(-1).values
    generator = torch.Generator().manual_seed(1)
    uniform_B = torch.rand(64, generator=generator, dtype=torch.float64)
    uniform_B[0], uniform_B[1] = 0.0, 1 - 2.0**-53
    temperature_B = 0.1 + 2 * torch.rand(64, generator=generator, dtype=torch.float64)
    bits = 62 - size.bit_length()
    found = draw(logits, best_B, temperature_B=temperature_B, uniform_B=uniform_B, bits=bits, path=path)
    assert found.tolist() == [
        slow_draw(row.tolist(), temperature, uniform, 2**bits)
        for row, temperature, uniform in zip(logits, temperature_B.tolist(), uniform_B.tolist(), strict=True)
    ]


def slow_draw(logits: list[float], temperature: float, uniform: float, scale: int) -> int:
    best = max(logits)
    weights = [int(math.exp((logit - best) / temperature) * scale) for logit in logits]
    target = min(int(uniform * float(sum(weights))), sum(weights) - 1)
    return next(place for place, total in enumerate(accumulate(weights)) if total > target)


@pytest.mark.parametrize("path", native_paths())
def test_a_draw_never_takes_what_has_no_weight(path) -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf], [-1e30, -math.inf, 3.0], [math.nan] * 3, [-math.inf] * 3])
    places = draw(
        logits,
        torch.tensor([0.0, 3.0, math.nan, -math.inf]),
        temperature_B=torch.tensor([1e-300, 1.0, 1.0, 1.0], dtype=torch.float64),
        uniform_B=torch.full((4,), 1 - 2.0**-53, dtype=torch.float64),
        bits=60,
        path=path,
    )
    assert places[:2].tolist() == [1, 2]
    assert ((places >= 0) & (places < 3)).all()


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("shape", [(64, 8209), (5003, 77), (600, 4100)])
def test_company_and_threads_change_no_bit(path, shape) -> None:
    x = numbers(shape, torch.bfloat16)
    norm = SumNorm(torch.ones(shape[1]), shape[1], 1e-6, path=path)
    logits = x.float()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((norm(x), gated(x, x, "silu", path=path), greatest(logits, path=path)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(results[0][0][5:6], norm(x[5:6]))
    assert torch.equal(results[0][1][5:6], gated(x[5:6], x[5:6], "silu", path=path))


def test_what_is_taken() -> None:
    assert takes_leaves(torch.device("cpu"), torch.bfloat16)
    assert not takes_leaves(torch.device("cpu"), torch.float64)
    assert not takes_leaves(torch.device("meta"), torch.float32)
    assert SumNorm(None, 8, 1e-6)(torch.empty(0, 8)).shape == (0, 8)


def test_a_norm_is_nearly_always_the_nearest_number() -> None:
    x, weight = numbers((2000, 1100), torch.bfloat16), numbers((1100,), torch.bfloat16, seed=1)
    exact = F.rms_norm(x.double(), (1100,), weight.double(), 1e-5)
    assert float((SumNorm(weight, 1100, 1e-5)(x) != exact.bfloat16()).double().mean()) < 1e-3


def test_norms_of_models_take_bfloat16_here_and_float32_in_torch() -> None:
    weight = 1 + numbers((64,), torch.bfloat16, seed=1)
    norm = Norm(NormSpec(kind="rms", eps=1e-5), 64, weight, None)
    x = numbers((4, 6, 64), torch.bfloat16)
    assert takes_activations(x)
    assert torch.equal(norm(x), SumNorm(weight, 64, 1e-5)(x))
    assert torch.equal(norm(x[:, ::2]), F.rms_norm(x[:, ::2], (64,), weight, 1e-5))
    assert not takes_activations(x.float())
    single = Norm(NormSpec(kind="rms", eps=1e-5), 64, weight.float(), None)
    assert torch.equal(single(x.float()), F.rms_norm(x.float(), (64,), weight.float(), 1e-5))
    with_gradient = x.requires_grad_()
    assert not takes_activations(with_gradient)
    assert norm(with_gradient).requires_grad
    with torch.no_grad():
        assert takes_activations(with_gradient)
