"""Causal attention of the native library against float64."""

from __future__ import annotations

import pytest
import torch

from optgptq.native.causal_attention import attends_causally, causal_attention
from optgptq.native.library import load_library

_library = load_library()
pytestmark = pytest.mark.skipif(
    _library is None or not _library.bfloat16_products, reason="no native library, or no products of bfloat16"
)

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention one query at a time, in float64."""
    group_size = query.shape[1] // key.shape[1]
    output = torch.empty(*query.shape[:3], value.shape[3], dtype=torch.float64)
    for sequence, head, token in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        keys = key[sequence, head // group_size, : token + 1].double()
        weights = torch.softmax(keys @ query[sequence, head, token].double() * scale, dim=0)
        output[sequence, head, token] = weights @ value[sequence, head // group_size, : token + 1].double()
    return output


def _heads(batch: int, num_heads: int, num_kv_heads: int, num_tokens: int, head_dim: int) -> Heads:
    generator = torch.Generator().manual_seed(num_tokens + head_dim)

    def projected(count: int) -> torch.Tensor:
        return torch.randn(batch, num_tokens, count, head_dim, generator=generator).bfloat16().transpose(1, 2)

    return projected(num_heads), projected(num_kv_heads), projected(num_kv_heads)


@pytest.mark.parametrize(
    "sizes", [(2, 4, 2, 37, 32), (1, 1, 1, 2, 16), (1, 3, 3, 64, 48), (2, 6, 1, 33, 80), (1, 2, 2, 131, 128)]
)
def test_output_is_near_the_exact_one(sizes: tuple[int, int, int, int, int]) -> None:
    query, key, value = _heads(*sizes)
    scale = 1.3 / sizes[-1] ** 0.5
    assert attends_causally(query, key, value, scale=scale)
    found, exact = causal_attention(query, key, value, scale=scale), _exact(query, key, value, scale)
    assert found.shape == query.shape
    assert found.dtype == torch.bfloat16
    # Weights and the output are rounded to 8 bits each.
    assert float((found.double() - exact).norm() / exact.norm()) < 2.0**-8
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("value_dim", [16, 80])
def test_some_positions_and_values_of_another_width(value_dim: int) -> None:
    query, key, _ = _heads(3, 4, 2, 75, 32)
    # One row of values for all heads, as inputs of a layer are, in memory that has gaps.
    inputs = torch.randn(3, 75, value_dim + 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    value = inputs[:, None, :, :value_dim].expand(-1, 2, -1, -1)
    positions = torch.tensor([[0, 1, 40, 41, 42, 43, 44, 45, 46, 74], [*range(10)], [*range(65, 75)]])
    found = causal_attention(query, key, value, scale=0.2, positions_BQ=positions)
    whole = causal_attention(query, key, value, scale=0.2)
    exact = _exact(query, key, value, 0.2)
    torch.testing.assert_close(whole.double(), exact, rtol=2.0**-7, atol=2.0**-7)
    for sequence, of_sequence in enumerate(positions):
        assert torch.equal(found[sequence], whole[sequence][:, of_sequence])
    assert torch.equal(causal_attention(query, key, value, scale=0.2, positions_BQ=positions[:, :3]), found[:, :, :3])


def test_large_scores_neither_overflow_nor_blur() -> None:
    query, key, value = _heads(1, 2, 1, 50, 32)
    query, key = query * 30, key * 30
    found = causal_attention(query, key, value, scale=1.0)
    torch.testing.assert_close(found.double(), _exact(query, key, value, 1.0), rtol=2.0**-6, atol=2.0**-6)


def test_positions_see_nothing_of_later_ones() -> None:
    query, key, value = _heads(1, 2, 2, 70, 32)
    whole = causal_attention(query, key, value, scale=0.2)
    for end in (1, 8, 33, 69):
        begin = [heads[:, :, :end] for heads in (query, key, value)]
        assert torch.equal(causal_attention(*begin, scale=0.2), whole[:, :, :end])


def test_what_is_not_finite_stays_so() -> None:
    query, key, value = _heads(2, 2, 2, 40, 32)
    query[0, 1, 7] = torch.nan
    found = causal_attention(query, key, value, scale=0.2)
    assert bool(found[0, 1, 7].isnan().all())
    assert int(found.isnan().sum()) == 32


def test_threads_and_batches_change_no_bit() -> None:
    heads = _heads(6, 4, 2, 300, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(causal_attention(*heads, scale=0.125))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    alone = causal_attention(*(part[3:4] for part in heads), scale=0.125)
    assert torch.equal(alone, results[0][3:4])


def test_only_what_fits_is_taken() -> None:
    query, key, value = _heads(1, 2, 1, 5, 32)
    assert attends_causally(query, key, value, scale=0.2)
    assert not attends_causally(query.float(), key.float(), value.float(), scale=0.2)
    assert not attends_causally(query[..., :24], key[..., :24], value[..., :24], scale=0.2)
    assert not attends_causally(query[:, :, -1:], key, value, scale=0.2)
    assert attends_causally(query, key, value[..., :16], scale=0.2)
    assert not attends_causally(query, key, value[..., :24], scale=0.2)
    assert not attends_causally(query, key, value[:, :, :4], scale=0.2)
    assert not attends_causally(query, key, value, scale=-0.2)
    assert not attends_causally(query.requires_grad_(), key, value, scale=0.2)
