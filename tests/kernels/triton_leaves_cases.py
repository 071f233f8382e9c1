"""The triton kernels between products against float64, for a run of pytest that `test_triton_leaves.py` starts.

Under `TRITON_INTERPRET=1`, set before triton is imported, numpy runs the kernels on the processor; without it the
machine's GPU does.
"""

from __future__ import annotations

import os

import pytest
import torch
from support.interpreted_triton import repair_bfloat16

from optgptq.kernels.triton_leaves import GATED_KINDS, gated, rms_norm, rotate_in_place
from optgptq.models.activations import ACTIVATIONS
from optgptq.models.norm import Norm
from optgptq.models.rope import RopeTable
from optgptq.models.rope import rotate_in_place as rotate_in_torch
from optgptq.models.spec import NormSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# One rounding of the result, and what float32 loses before it.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Steps in torch round several times.
TORCH_TOLERANCES = {torch.float32: 4e-6, torch.float16: 6e-3, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def _bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        repair_bfloat16(monkeypatch)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def require_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 64), (5, 200), (2, 1030)])
def test_the_norm_is_that_of_the_definition(rows, size, dtype):
    x, weight = numbers(rows, size, dtype=dtype), numbers(size, dtype=dtype, seed=1)
    found = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5)
    assert found.dtype == dtype
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    require_close(found, expected * weight.double(), TOLERANCES[dtype])
    require_close(rms_norm(x.to(DEVICE), None, 1e-5), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("weight_offset", [False, True])
def test_the_norm_is_that_of_the_model(weight_offset, dtype):
    weight = numbers(48, dtype=torch.float32 if weight_offset else dtype, seed=1)
    norm = Norm(spec=NormSpec(kind="rms", eps=1e-6, weight_offset=weight_offset), size=48, weight=weight, bias=None)
    x = numbers(2, 7, 48, dtype=dtype)
    require_close(rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-6), norm(x), TORCH_TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_a_residual_becomes_the_sum_that_is_normed(dtype):
    x, residual = numbers(5, 100, dtype=dtype), numbers(5, 100, dtype=dtype, seed=2)
    weight, total = numbers(100, dtype=dtype, seed=1).to(DEVICE), residual.clone().to(DEVICE)
    found = rms_norm(x.to(DEVICE), weight, 1e-5, total)
    assert torch.equal(total.cpu(), x + residual)
    assert torch.equal(found, rms_norm(total, weight, 1e-5))


def test_rows_of_the_norm_may_be_apart_and_do_not_depend_on_each_other():
    joint = numbers(6, 3, 40, dtype=torch.float16).to(DEVICE)
    weight = numbers(40, dtype=torch.float16, seed=1).to(DEVICE)
    expected = rms_norm(joint, weight, 1e-5)
    assert torch.equal(rms_norm(joint[:, 1], weight, 1e-5), expected[:, 1])
    assert torch.equal(rms_norm(joint[4:5, 2], weight, 1e-5), expected[4:5, 2])
    assert rms_norm(joint[:0], weight, 1e-5).shape == (0, 3, 40)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotated"), [(4, 4, 16, 16), (10, 1, 20, 12), (1, 2, 8, 2)]
)
def test_rotation_is_that_of_the_model_in_one_launch(num_heads, num_kv_heads, head_dim, rotated, dtype):
    angles = numbers(5, 1, rotated // 2, dtype=torch.float32, seed=3)
    table = RopeTable(cosine=angles.cos().to(dtype), sine=angles.sin().to(dtype))
    joint = numbers(5, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    found = joint.clone().to(DEVICE)
    heads = (slice(0, num_heads), slice(num_heads, num_heads + num_kv_heads))
    rotate_in_place(*(found[:, each] for each in heads), table.cosine.to(DEVICE), table.sine.to(DEVICE))
    expected = joint.double()
    for each in heads:
        wide = RopeTable(cosine=table.cosine.double(), sine=table.sine.double())
        rotate_in_torch(expected[:, each].unsqueeze(0), wide)
    require_close(found, expected, TOLERANCES[dtype])
    assert torch.equal(found.cpu()[:, num_heads + num_kv_heads :], joint[:, num_heads + num_kv_heads :])
    assert torch.equal(found.cpu()[..., rotated:], joint[..., rotated:])


def test_rotation_of_a_packed_sequence_and_of_nothing():
    query, key = (numbers(1, 3, heads, 8, dtype=torch.float32).to(DEVICE) for heads in (2, 1))
    cosine, sine = (numbers(3, 4, dtype=torch.float32, seed=seed).to(DEVICE) for seed in (1, 2))
    flat = query[0].clone()
    rotate_in_place(query, key, cosine, sine)
    rotate_in_place(flat, key[0].clone(), cosine.unsqueeze(1), sine.unsqueeze(1))
    assert torch.equal(query[0], flat)
    rotate_in_place(query[:, :0], key[:, :0], cosine[:0], sine[:0])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_gated_activations_are_those_of_the_model(kind, dtype):
    joint = numbers(3, 2 * 70, dtype=dtype) * 3
    gate, up = joint.chunk(2, dim=-1)
    found = gated(*(joint.to(DEVICE).chunk(2, dim=-1)), kind)
    assert found.dtype == dtype
    require_close(found, ACTIVATIONS[kind](gate.double().clone()) * up.double(), 2 * TOLERANCES[dtype])
    steps = ACTIVATIONS[kind](gate.clone()) * up
    require_close(found, steps, TORCH_TOLERANCES[dtype])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_gated_activations_of_large_inputs_and_many_columns():
    gate = torch.tensor([-1e4, -80.0, -20.0, 0.0, 20.0, 1e4]).repeat(400).unsqueeze(0)
    for kind in GATED_KINDS:
        found = gated(gate.to(DEVICE), torch.ones_like(gate).to(DEVICE), kind)
        require_close(found, ACTIVATIONS[kind](gate.double().clone()), 2e-6)
    assert gated(gate[:0].to(DEVICE), gate[:0].to(DEVICE), "silu").shape == (0, gate.shape[1])


def test_every_activation_of_the_models_has_a_kernel():
    assert set(GATED_KINDS) == set(ACTIVATIONS)
