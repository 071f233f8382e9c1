"""Dense bfloat16 products of the native library against float64, and the two ways to add products of pairs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from optgptq.models.linear import Linear
from optgptq.native.causal_attention import causal_attention
from optgptq.native.dense_products import dense_product, has_dense_products, pack_dense, takes_dense
from optgptq.native.library import PairWay
from optgptq.native.moment import add_moment, add_products

pytestmark = pytest.mark.skipif(not has_dense_products(), reason="no native library, or no products of bfloat16")

WAYS: tuple[PairWay, ...] = ("instruction", "widened")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def in_order(x_MI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """One float32 sum over pairs of columns, the second of each first; products of bfloat16 numbers are exact."""
    sum_MO = torch.zeros(len(x_MI), len(weight_OI))
    for pair in range(0, x_MI.shape[1], 2):
        for column in (pair + 1, pair):
            if column < x_MI.shape[1]:
                sum_MO += x_MI[:, column, None].float() * weight_OI[None, :, column].float()
    return sum_MO


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_columns", [1, 2, 3, 31, 64, 129])
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 32, 33, 100])
def test_products_are_sums_in_order_rounded_once(num_rows: int, num_columns: int, way: PairWay) -> None:
    weight_OI, bias_O = normal(num_rows, num_columns), normal(num_rows, seed=1)
    tiles = pack_dense(weight_OI)
    for num_tokens in (1, 2, 5, 11, 12, 13, 25):
        x_MI = normal(num_tokens, num_columns, seed=num_tokens)
        exact_MO = in_order(x_MI, weight_OI)
        assert torch.equal(dense_product(x_MI, tiles, way=way), exact_MO.bfloat16())
        assert torch.equal(dense_product(x_MI, tiles, bias_O, way=way), (exact_MO + bias_O.float()).bfloat16())


def test_a_wide_product_is_near_that_of_float64() -> None:
    x_MI, weight_OI = normal(2003, 1537), normal(259, 1537, seed=1)
    exact_MO = x_MI.double() @ weight_OI.double().T
    error = float((dense_product(x_MI, pack_dense(weight_OI)).double() - exact_MO).norm() / exact_MO.norm())
    assert error < 2.0**-8
    assert error < 1.01 * float((F.linear(x_MI, weight_OI).double() - exact_MO).norm() / exact_MO.norm())


def test_batches_and_threads_change_no_bit() -> None:
    x_MI, tiles = normal(613, 96), pack_dense(normal(200, 96, seed=1))
    whole = dense_product(x_MI, tiles)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(dense_product(x_MI, tiles), whole)
            assert torch.equal(dense_product(x_MI[600:], tiles), whole[600:])
            assert torch.equal(pack_dense(normal(200, 96, seed=1)).tiles, tiles.tiles)
    finally:
        torch.set_num_threads(before)


def test_shapes_strides_and_nothing() -> None:
    weight_OI = normal(40, 64)
    tiles = pack_dense(weight_OI[:, :32])
    assert torch.equal(tiles.tiles, pack_dense(weight_OI[:, :32].contiguous()).tiles)
    x = normal(2, 3, 64)[..., ::2]
    found = dense_product(x, tiles)
    assert found.shape == (2, 3, 40)
    assert torch.equal(found, dense_product(x.reshape(6, 32), tiles).view(2, 3, 40))
    assert dense_product(x[:, :0], tiles).shape == (2, 0, 40)


def test_what_is_not_finite_stays_in_its_token_and_row() -> None:
    x_MI, weight_OI = normal(20, 33), normal(50, 33, seed=1)
    x_MI[7, 32] = torch.nan
    weight_OI[49, 0] = torch.inf
    found = dense_product(x_MI, pack_dense(weight_OI))
    assert bool(found[7].isnan().all())
    assert not bool(found[:, 49].isfinite().any())
    finite = torch.ones(20, 50, dtype=torch.bool)
    finite[7], finite[:, 49] = False, False
    assert torch.equal(found.isfinite(), finite)


def test_a_linear_takes_them_for_many_tokens_without_gradient() -> None:
    linear = Linear(normal(32, 16), normal(32, seed=1))
    x = normal(2, 200, 16)
    assert takes_dense(x, linear.weight_OI)
    assert torch.equal(linear(x), dense_product(x, pack_dense(linear.weight_OI), linear.bias_O))
    assert not takes_dense(x[:1], linear.weight_OI)
    assert not takes_dense(x.float(), linear.weight_OI.float())
    assert not takes_dense(x, linear.weight_OI.T.contiguous().T)
    learned = linear.weight_OI.clone().requires_grad_()
    assert not takes_dense(x, learned)
    Linear(learned)(x).float().sum().backward()
    assert learned.grad is not None
    with torch.no_grad():
        assert takes_dense(x, learned)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 37, 32), (1, 3, 3, 64, 48), (1, 2, 1, 131, 80)])
def test_attention_has_the_same_bits_both_ways(sizes: tuple[int, int, int, int, int]) -> None:
    batch, num_heads, num_kv_heads, num_tokens, head_dim = sizes
    query, key, value = (
        normal(batch, num_tokens, count, head_dim, seed=count + place).transpose(1, 2)
        for place, count in enumerate((num_heads, num_kv_heads, num_kv_heads))
    )
    one, other = (causal_attention(query, key, value, scale=0.3, way=way) for way in WAYS)
    assert torch.equal(one, other)


@pytest.mark.parametrize(("num_tokens", "num_columns"), [(1, 1), (3, 47), (131, 49), (4099, 97)])
def test_moments_have_the_same_bits_both_ways(num_tokens: int, num_columns: int) -> None:
    left, right = normal(num_tokens, num_columns), normal(num_tokens, 20, seed=1)
    moments, products = [], []
    for way in WAYS:
        moments.append(torch.zeros(num_columns, num_columns))
        add_moment(left, moments[-1], way=way)
        products.append(torch.zeros(num_columns, 20))
        add_products(left, right, products[-1], way=way)
    assert torch.equal(moments[0].triu(), moments[1].triu())
    assert torch.equal(*products)
