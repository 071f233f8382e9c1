"""The derivative of a query or key norm against finite differences and against matrices per token."""

from __future__ import annotations

import pytest
import torch
from support.attention_layers import ROPE, literal_rotation

from optgptq.calibration.normed_heads import NormedHeads
from optgptq.models.norm import Norm
from optgptq.models.spec import NormSpec, RopeSpec

NUM_POSITIONS = 9


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm_of(*, weighted: bool = True) -> Norm:
    return Norm(NormSpec(kind="rms", eps=0.05), 5, 1 + 0.4 * random(5, seed=1) if weighted else None, None)


def moment_of(num_heads: int) -> torch.Tensor:
    root = random(num_heads, 5, 7, seed=2)
    return root @ root.mT


def sample(norm: Norm, rope: RopeSpec | None, *, num_heads: int = 3) -> tuple[NormedHeads, torch.Tensor, torch.Tensor]:
    heads = NormedHeads(norm, rope, num_positions=NUM_POSITIONS)
    raw_TND, positions_T = random(8, num_heads, 5, seed=3), torch.tensor([0, 3, 3, 8, 1, 2, 7, 5])
    heads.add(raw_TND[:5], positions_T[:5])
    heads.add(raw_TND[5:], positions_T[5:])
    return heads, raw_TND, positions_T


def rotation(rope: RopeSpec | None, position: int) -> torch.Tensor:
    if rope is None:
        return torch.eye(5, dtype=torch.float64)
    return literal_rotation(rope, position, num_positions=NUM_POSITIONS, head_dim=5)


@pytest.mark.parametrize("rope", [None, ROPE])
@pytest.mark.parametrize("weighted", [True, False])
def test_predicts_small_changes_through_norm_and_rotation(rope: RopeSpec | None, weighted: bool) -> None:
    norm = norm_of(weighted=weighted)
    heads, raw_TND, positions_T = sample(norm, rope)
    moment_NDD = moment_of(3)
    factor_NDD = heads.row_factor(moment_NDD)
    step_D = 1e-6 * random(5, seed=4)
    for head in range(3):
        measured = 0.0
        for raw_ND, position in zip(raw_TND, positions_T.tolist(), strict=True):
            change_D = rotation(rope, position) @ (norm(raw_ND[head] + step_D) - norm(raw_ND[head]))
            measured += float(change_D @ moment_NDD[head] @ change_D) / len(raw_TND)
        assert float(step_D @ factor_NDD[head] @ step_D) == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize("rope", [None, ROPE])
def test_equals_the_mean_over_matrices_of_every_token(rope: RopeSpec | None) -> None:
    norm = norm_of()
    assert norm.weight is not None
    heads, raw_TND, positions_T = sample(norm, rope)
    moment_NDD = moment_of(3)
    expected_NDD = torch.zeros_like(moment_NDD)
    for raw_ND, position in zip(raw_TND, positions_T.tolist(), strict=True):
        for head, raw_D in enumerate(raw_ND):
            rho = (raw_D.square().mean() + 0.05).sqrt()
            inner_DD = torch.eye(5, dtype=torch.float64) - torch.outer(raw_D, raw_D) / (5 * rho**2)
            jacobian_DD = rotation(rope, position) @ torch.diag(norm.weight) @ inner_DD / rho
            expected_NDD[head] += jacobian_DD.T @ moment_NDD[head] @ jacobian_DD / len(raw_TND)
    factor_NDD = heads.row_factor(moment_NDD)
    torch.testing.assert_close(factor_NDD, expected_NDD, rtol=1e-6, atol=1e-6)
    assert torch.equal(factor_NDD, factor_NDD.mT)
    assert float(torch.linalg.eigvalsh(factor_NDD).min()) > -1e-6


def test_an_empty_sample_gives_zero() -> None:
    heads = NormedHeads(norm_of(), ROPE, num_positions=4)
    assert heads.num_tokens == 0
    assert torch.equal(heads.row_factor(moment_of(2)), torch.zeros(2, 5, 5, dtype=torch.float64))


def test_samples_are_copies() -> None:
    heads = NormedHeads(norm_of(), None, num_positions=4)
    raw_TND = random(2, 2, 5, seed=6)
    heads.add(raw_TND, torch.tensor([0, 1]))
    before = heads.row_factor(moment_of(2))
    raw_TND.fill_(float("nan"))
    assert heads.is_finite()
    assert torch.equal(heads.row_factor(moment_of(2)), before)
    heads.add(raw_TND, torch.tensor([0, 1]))
    assert not heads.is_finite()
