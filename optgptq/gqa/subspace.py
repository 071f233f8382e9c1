"""The best subspace that several heads can share: a weighted low-rank problem, solved in closed form.

The heads of a group have activations `x_h`; they become `t_h s` with one shared `s = sum_h e_h x_h` of `R` numbers.
What an error of head `h` costs is a quadratic form `W_h` (of the queries that meet the keys, of the output projection
that reads the values), so the sum over heads of `tr(W_h (x_h - t_h s) (x_h - t_h s)^H)` is least. With `C` the moment
of the stacked activations and `W` the block diagonal of the `W_h`, the optimum keeps the leading eigenvectors of
`W^1/2 C W^1/2` (docs/math/grouped-query.md).

Shapes: `K` heads of the group, `D` features of a head, `R` features of the shared head. Real, or complex where a
feature is a frequency plane of a rotary embedding. Everything is float64 or complex128.

Source: Eckart and Young, 1936, for the weighted matrix; the use on heads follows Yu et al., arXiv 2406.07056.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Share of the mean diagonal that is added to the weights: directions that no query of the calibration text looks at
# still count a little. It does not change which groups can be merged without error.
_WEIGHT_FLOOR = 1e-4
# Eigenvalues below this share of the largest are rounding errors of a moment that has fewer dimensions.
_NEGLIGIBLE = 1e-13


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SharedSubspace:
    """The maps to a shared head and back.

    Attributes:
        encode_RKD: `s = sum_h encode[:, h] x_h`.
        decode_KDR: `x_h ~ decode[h] s`.
        error: weighted energy that is lost.
        energy: weighted energy of the heads.
    """

    encode_RKD: torch.Tensor
    decode_KDR: torch.Tensor
    error: float
    energy: float


def shared_subspace(weights_KDD: torch.Tensor, moment_KDKD: torch.Tensor, rank: int) -> SharedSubspace:
    """Return the maps of `rank` features with the least weighted error.

    The energy of each shared feature is split evenly between the two maps: shared keys and the queries that meet them
    have the same moment.

    Args:
        weights_KDD: `[K, D, D]` Hermitian, not negative.
        moment_KDKD: `[K, D, K, D]`, mean of `x x^H`.
        rank: features of the shared head, at most `K D`.
    """
    num_heads, size = weights_KDD.shape[:2]
    root = _square_root(weights_KDD)
    moment = moment_KDKD.reshape(num_heads * size, num_heads * size)
    values, vectors = torch.linalg.eigh(_hermitian(root @ moment @ root))
    values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
    kept, leading = values[:rank], vectors[:, :rank]
    significant = kept > _NEGLIGIBLE * values[0]
    safe = torch.where(significant, kept, torch.ones_like(kept))
    encode = (root @ leading).mH * safe.pow(-0.25).unsqueeze(1)
    # Regression of the heads on the shared features: right also where the moment is singular.
    decode = moment @ root @ leading * torch.where(significant, safe.pow(-0.75), torch.zeros_like(safe))
    return SharedSubspace(
        encode_RKD=encode.reshape(rank, num_heads, size),
        decode_KDR=decode.reshape(num_heads, size, rank),
        error=float(values[rank:].sum()),
        energy=float(values.sum()),
    )


def weighted_moment(weights_KDD: torch.Tensor, moment_KDKD: torch.Tensor) -> torch.Tensor:
    """Return `W^1/2 C W^1/2`, `[K, D, K, D]`; its trace is the weighted energy of the heads."""
    num_heads, size = weights_KDD.shape[:2]
    root = _square_root(weights_KDD)
    return _hermitian(root @ moment_KDKD.reshape(num_heads * size, num_heads * size) @ root).view(moment_KDKD.shape)


def _square_root(weights_KDD: torch.Tensor) -> torch.Tensor:
    """Return the root of the block diagonal, `[K D, K D]`."""
    num_heads, size = weights_KDD.shape[:2]
    floor = _WEIGHT_FLOOR * float(weights_KDD.diagonal(dim1=-2, dim2=-1).real.mean())
    identity = torch.eye(size, dtype=weights_KDD.dtype, device=weights_KDD.device)
    # Heads that nothing looks at share what their plain moment says.
    values_KD, vectors_KDD = torch.linalg.eigh(_hermitian(weights_KDD + (floor or 1.0) * identity))
    root_KDKD = weights_KDD.new_zeros(num_heads, size, num_heads, size)
    heads = torch.arange(num_heads, device=weights_KDD.device)
    root_KDKD[heads, :, heads] = (vectors_KDD * values_KD.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors_KDD.mH
    return root_KDKD.view(num_heads * size, num_heads * size)


def _hermitian(matrix: torch.Tensor) -> torch.Tensor:
    adjoint: torch.Tensor = matrix.mH
    return (matrix + adjoint) / 2
