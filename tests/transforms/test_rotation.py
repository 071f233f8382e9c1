from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.quantizable import tiny_model
from support.tiny_models import TINY_MODELS, TinyModel, reference_model

from optgptq.models.registry import config_spec
from optgptq.models.spec import DecoderSpec
from optgptq.transforms.rotation import Rotation, ValueRotations, residual_rotation, value_rows
from optgptq.transforms.settings import TransformSettings


def spec_of(tiny: TinyModel) -> DecoderSpec:
    config = reference_model(tiny).config.to_dict()
    return config_spec({**config, "architectures": [tiny.architecture]})


def dense(rotation: Rotation) -> torch.Tensor:
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in rotation.factors:
        product = torch.kron(product, factor)
    return torch.diag(rotation.signs_M) @ product


@pytest.mark.parametrize("sizes", [(5,), (3, 2), (2, 3, 4)])
def test_the_factored_product_is_the_dense_one(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = tuple(torch.randn(size, size, dtype=torch.float64, generator=generator) for size in sizes)
    width = int(torch.tensor(sizes).prod())
    signs_M = torch.ones(width, dtype=torch.float64)
    signs_M[::3] = -1
    rotation = Rotation(signs_M=signs_M, factors=factors)
    rows = torch.randn(7, 2, width, dtype=torch.float64, generator=generator)
    assert torch.allclose(rotation.apply(rows), rows @ dense(rotation), rtol=0, atol=1e-12)
    assert torch.allclose(rotation.apply(rows[:, 0].T.contiguous().T), rows[:, 0] @ dense(rotation), rtol=0, atol=1e-12)


def test_rms_models_get_hadamard_where_the_width_allows_it() -> None:
    spec = spec_of(tiny_model("llama-grouped_query"))
    for kind, flat in (("hadamard", True), ("random", False)):
        rotation = residual_rotation(spec, TransformSettings(residual_rotation=kind, seed=1))
        assert rotation is not None
        magnitudes = dense(rotation).abs()
        assert bool((magnitudes - 24**-0.5).abs().max() < 1e-12) is flat
    odd = residual_rotation(replace(spec, hidden_size=15), TransformSettings(residual_rotation="hadamard"))
    assert odd is not None
    assert torch.allclose(dense(odd) @ dense(odd).T, torch.eye(15, dtype=torch.float64), rtol=0, atol=1e-12)
    assert residual_rotation(spec, TransformSettings(fold_norms=True)) is None


def test_layer_norm_models_keep_the_direction_of_ones() -> None:
    spec = spec_of(tiny_model("gpt2-conv1d"))
    rotation = residual_rotation(spec, TransformSettings(residual_rotation="hadamard"))
    assert rotation is not None
    ones = torch.ones(spec.hidden_size, dtype=torch.float64)
    assert torch.allclose(rotation.apply(ones), ones, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama-grouped_query", "phi3-longrope", "gptneox-parallel", "falcon-grouped"])
def test_value_rows_are_those_of_the_decoder(name: str) -> None:
    spec = spec_of(next(tiny for tiny in TINY_MODELS if tiny.name == name))
    queries, keys, width = spec.num_heads, spec.num_kv_heads, spec.head_dim
    for head in range(keys):
        if spec.qkv_layout == "split":
            first = head * width
        elif spec.qkv_layout == "concatenated":
            first = (queries + keys + head) * width
        elif spec.qkv_layout == "per_head_interleaved":
            first = (3 * head + 2) * width
        else:
            first = (head * (queries // keys + 2) + queries // keys + 1) * width
        assert value_rows(spec)[head].tolist() == list(range(first, first + width))


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_values_and_outputs_are_rotated_head_by_head(kind: str) -> None:
    """Literal version: loops over heads; every head and layer has a rotation of its own."""
    spec = spec_of(tiny_model("llama-grouped_query"))
    rotations = ValueRotations(kind=kind, seed=2, spec=spec)
    matrices_KDD = rotations.matrices(1)
    generator = torch.Generator().manual_seed(1)
    value_OI = torch.randn(2 * 4, 24, dtype=torch.float64, generator=generator)
    output_OI = torch.randn(24, 6 * 4, dtype=torch.float64, generator=generator)
    expected_value, expected_output = value_OI.clone(), output_OI.clone()
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        expected_value[rows] = matrices_KDD[head].T @ value_OI[rows]
    for head in range(6):
        columns = slice(4 * head, 4 * head + 4)
        expected_output[:, columns] = output_OI[:, columns] @ matrices_KDD[head // 3]
    assert torch.allclose(rotations.rotate_rows(value_OI, 1), expected_value, rtol=0, atol=1e-12)
    assert torch.allclose(rotations.rotate_columns(output_OI, 1), expected_output, rtol=0, atol=1e-12)
    assert not torch.equal(matrices_KDD[0], matrices_KDD[1])
    assert not torch.equal(matrices_KDD, rotations.matrices(0))
