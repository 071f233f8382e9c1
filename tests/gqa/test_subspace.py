"""The shared subspace against random search, gradients and what is known in closed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.gqa.rotary import plane_moments, shared_rotary_key
from optgptq.gqa.subspace import SharedSubspace, shared_subspace, weighted_moment


def random_problem(heads: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[K, D, D]` and a moment `[K, D, K, D]` of full rank, float64."""
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(heads, size, size + 2, generator=generator, dtype=torch.float64)
    samples = torch.randn(5 * heads * size, heads * size, generator=generator, dtype=torch.float64)
    moment = samples.T @ samples / len(samples)
    return roots @ roots.mT, moment.view(heads, size, heads, size)


def literal_error(
    weights_KDD: torch.Tensor, moment_KDKD: torch.Tensor, encode_RKD: torch.Tensor, decode_KDR: torch.Tensor
) -> torch.Tensor:
    """Sum over heads of `tr(W_h E[(x_h - t_h s) (x_h - t_h s)^T])`, head by head."""
    heads, size = weights_KDD.shape[:2]
    moment = moment_KDKD.reshape(heads * size, heads * size)
    encode = encode_RKD.reshape(-1, heads * size)
    total = moment.new_zeros(())
    for head in range(heads):
        pick = torch.zeros(size, heads * size, dtype=moment.dtype)
        pick[:, head * size : (head + 1) * size] = torch.eye(size, dtype=moment.dtype)
        residual = pick - decode_KDR[head] @ encode
        total = total + torch.trace(weights_KDD[head] @ residual @ moment @ residual.mH).real
    return total


@pytest.mark.parametrize(("heads", "size", "rank"), [(2, 3, 3), (3, 2, 2), (2, 4, 3), (4, 1, 1), (1, 3, 3)])
def test_the_error_is_the_literal_one_and_no_other_subspace_is_better(heads: int, size: int, rank: int) -> None:
    weights, moment = random_problem(heads, size, seed=heads + size)
    shared = shared_subspace(weights, moment, rank)
    found = literal_error(weights, moment, shared.encode_RKD, shared.decode_KDR)
    # The floor under the weights is a ten-thousandth of their mean.
    assert float(found) == pytest.approx(shared.error, rel=2e-3, abs=1e-9)
    generator = torch.Generator().manual_seed(1)
    for step in (1.0, 0.1, 0.01):
        for _ in range(100):
            maps = [
                part + step * torch.randn(part.shape, generator=generator, dtype=torch.float64)
                for part in (shared.encode_RKD, shared.decode_KDR)
            ]
            assert float(literal_error(weights, moment, *maps)) >= float(found) * (1 - 1e-3)


def error_after_descent(weights: torch.Tensor, moment: torch.Tensor, generator: torch.Generator) -> float:
    encode = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    decode = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([encode, decode], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        error = literal_error(weights, moment, encode, decode)
        error.backward()
        return error

    optimizer.step(closure)
    return float(closure().detach())


def test_gradients_from_random_starts_end_at_the_same_error() -> None:
    weights, moment = random_problem(3, 2, seed=9)
    best = shared_subspace(weights, moment, 2).error
    generator = torch.Generator().manual_seed(3)
    ends = [error_after_descent(weights, moment, generator) for _ in range(3)]
    assert min(ends) == pytest.approx(best, rel=2e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 100))
def test_heads_of_one_subspace_come_back(heads: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights, _ = random_problem(heads, size, seed)
    maps = torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
    source = torch.randn(100, size, generator=generator, dtype=torch.float64)
    heads_TKD = torch.einsum("kde,te->tkd", maps, source)
    moment = torch.einsum("tkd,tge->kdge", heads_TKD, heads_TKD) / 100
    shared = shared_subspace(weights, moment, size)
    back = restored(shared, heads_TKD)
    torch.testing.assert_close(back, heads_TKD, rtol=1e-6, atol=1e-6 * float(heads_TKD.abs().max()))
    assert shared.error <= 1e-10 * shared.energy


def restored(shared: SharedSubspace, heads_TKD: torch.Tensor) -> torch.Tensor:
    features_TR = torch.einsum("rkd,tkd->tr", shared.encode_RKD, heads_TKD)
    return torch.einsum("kdr,tr->tkd", shared.decode_KDR, features_TR)


def test_shared_keys_and_their_queries_have_the_same_moment() -> None:
    weights, moment = random_problem(3, 4, seed=4)
    shared = shared_subspace(weights, moment, 4)
    keys = torch.einsum("rkd,kdge,sge->rs", shared.encode_RKD, moment, shared.encode_RKD)
    queries = torch.einsum("kdr,kde,kes->rs", shared.decode_KDR, weights, shared.decode_KDR)
    torch.testing.assert_close(queries, keys, rtol=1e-3, atol=1e-3 * float(keys.max()))
    off_diagonal = keys - torch.diag(keys.diagonal())
    assert float(off_diagonal.abs().max()) < 1e-10 * float(keys.max())


def test_the_weighted_moment_has_the_energy_of_all_heads() -> None:
    weights, moment = random_problem(2, 3, seed=6)
    energy = sum(float(torch.trace(weights[head] @ moment[head, :, head])) for head in range(2))
    found = torch.einsum("kdkd->", weighted_moment(weights, moment))
    assert float(found) == pytest.approx(energy, rel=1e-3)


def test_heads_that_nobody_reads_share_what_their_moment_says() -> None:
    _, moment = random_problem(2, 3, seed=8)
    zero = torch.zeros(2, 3, 3, dtype=torch.float64)
    shared = shared_subspace(zero, moment, 3)
    same = shared_subspace(torch.eye(3, dtype=torch.float64).expand(2, 3, 3), moment, 3)
    torch.testing.assert_close(shared.decode_KDR.abs(), same.decode_KDR.abs(), rtol=1e-3, atol=1e-3)


def rotation(size: int, rotary_dim: int, angle: torch.Tensor) -> torch.Tensor:
    """The rotation of a head by the angles of its planes, written feature by feature."""
    half, matrix = rotary_dim // 2, torch.eye(size, dtype=torch.float64)
    for plane in range(half):
        cosine, sine = angle[plane].cos(), angle[plane].sin()
        matrix[plane, plane], matrix[plane, plane + half] = cosine, -sine
        matrix[plane + half, plane], matrix[plane + half, plane + half] = sine, cosine
    return matrix


@pytest.mark.parametrize(("size", "rotary_dim"), [(6, 6), (7, 4), (4, 2)])
def test_rotary_maps_commute_with_every_rotation(size: int, rotary_dim: int) -> None:
    weights, moment = random_problem(3, size, seed=size)
    shared = shared_rotary_key(weights, moment, rotary_dim)
    angle = torch.randn(rotary_dim // 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turn = rotation(size, rotary_dim, angle)
    for head in range(3):
        for matrix in (shared.encode_RKD[:, head], shared.decode_KDR[head]):
            torch.testing.assert_close(turn @ matrix, matrix @ turn, rtol=0, atol=1e-12)


def test_no_other_factors_of_a_plane_are_better() -> None:
    weights, moment = random_problem(3, 2, seed=11)
    shared = shared_rotary_key(weights, moment, 2)
    plane = torch.diagonal(weights, dim1=1, dim2=2).sum(1)
    complex_moment = plane_moments(moment, 2)[0]
    encode = torch.complex(shared.encode_RKD[0, :, 0], shared.encode_RKD[1, :, 0])
    decode = torch.complex(shared.decode_KDR[:, 0, 0], shared.decode_KDR[:, 1, 0])

    def error(encode_K: torch.Tensor, decode_K: torch.Tensor) -> float:
        residual = torch.eye(3, dtype=torch.complex128) - torch.outer(decode_K, encode_K)
        each = torch.diagonal(residual @ complex_moment @ residual.mH).real
        return float((plane * each).sum())

    best = error(encode, decode)
    assert best / 2 == pytest.approx(shared.error, rel=2e-3)
    generator = torch.Generator().manual_seed(5)
    for step in (1.0, 0.1, 0.01):
        for _ in range(200):
            noise = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
            changed = [
                part + step * torch.view_as_complex(each) for part, each in zip((encode, decode), noise, strict=True)
            ]
            assert error(*changed) >= best * (1 - 1e-3)
