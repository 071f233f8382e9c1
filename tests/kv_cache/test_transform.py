"""Scores and outputs with transformed keys and values are those of the model."""

from __future__ import annotations

import pytest
import torch

from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.kv_cache.transform import HeadTransform, transform_vectors

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
NAMES = ("shift", "scale", "rotation")


def side_with(parts: tuple[str, ...], seed: int) -> SideParameters:
    generator = torch.Generator().manual_seed(seed)
    rotation_KDD = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM, generator=generator)).Q
    return SideParameters(
        shift_KD=torch.randn(KV_HEADS, HEAD_DIM, generator=generator) if "shift" in parts else None,
        scale_KD=torch.rand(KV_HEADS, HEAD_DIM, generator=generator) + 0.5 if "scale" in parts else None,
        rotation_KDD=rotation_KDD if "rotation" in parts else None,
    )


def attention(query_TND: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor) -> torch.Tensor:
    key_TND, value_TND = (rows.repeat_interleave(HEADS // KV_HEADS, 1) for rows in (key_TKD, value_TKD))
    scores_NQT = torch.einsum("qnd,tnd->nqt", query_TND, key_TND)
    return torch.einsum("nqt,tnd->qnd", scores_NQT.softmax(-1), value_TND)


@pytest.mark.parametrize("parts", [(), ("shift",), ("scale",), ("rotation",), ("scale", "rotation"), NAMES])
def test_attention_stays_what_it_was(parts: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    query_TND = torch.randn(5, HEADS, HEAD_DIM, generator=generator)
    key_TKD, value_TKD = torch.randn(2, 9, KV_HEADS, HEAD_DIM, generator=generator).unbind(0)
    transform = HeadTransform.of(LayerParameters(keys=side_with(parts, 0), values=side_with(parts, 1)))
    found = attention(transform.query(query_TND), transform.key(key_TKD), transform.value(value_TKD))
    expected = attention(query_TND, key_TKD, value_TKD)
    torch.testing.assert_close(transform.output(found), expected, rtol=2e-5, atol=2e-6)


def test_a_vector_by_definition() -> None:
    side = side_with(NAMES, 3)
    assert side.shift_KD is not None
    assert side.scale_KD is not None
    assert side.rotation_KDD is not None
    x_TKD = torch.randn(4, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(4))
    found = transform_vectors(x_TKD, side)
    for token in range(4):
        for head in range(KV_HEADS):
            expected = ((x_TKD[token, head] - side.shift_KD[head]) / side.scale_KD[head]) @ side.rotation_KDD[head]
            torch.testing.assert_close(found[token, head], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_comes_back(dtype: torch.dtype) -> None:
    transform = HeadTransform.of(LayerParameters(keys=side_with(NAMES, 0), values=side_with(NAMES, 1)))
    rows = torch.randn(3, KV_HEADS, HEAD_DIM).to(dtype)
    for changed in (transform.query, transform.key, transform.value, transform.output):
        assert changed(rows).dtype == dtype


def test_nothing_to_do_gives_the_same_tensor() -> None:
    nothing = HeadTransform.of(LayerParameters(keys=SideParameters(), values=SideParameters()))
    rows = torch.zeros(3, KV_HEADS, HEAD_DIM)
    assert all(same(rows) is rows for same in (nothing.query, nothing.key, nothing.value, nothing.output))
