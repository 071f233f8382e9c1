"""The two rotations: of the residual stream, and of the values of each key/value head.

Shapes: `M` model width, `K` key/value heads, `N` query heads, `D` head dimension. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.models.spec import DecoderSpec
from optgptq.transforms.hadamard import (
    hadamard,
    hadamard_factors,
    orthogonal_fixing_ones,
    random_orthogonal,
    random_signs,
)
from optgptq.transforms.head_rows import head_rows
from optgptq.transforms.settings import RotationKind, TransformSettings

# First number of the path that a seed is split along.
_RESIDUAL, _VALUE = 0, 1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rotation:
    """The orthogonal matrix `R = diag(signs) (F_1 ⊗ F_2 ⊗ ...)`, never formed.

    Attributes:
        signs_M: `[M]` of +1 and -1.
        factors: square orthogonal matrices; their sizes multiply to `M`.
    """

    signs_M: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `rows @ R` for float64 `rows` `[..., M]`."""
        rotated = (rows * self.signs_M).reshape(-1, self.signs_M.shape[0])
        count = rotated.shape[0]
        for factor in self.factors:
            # Each factor takes the first axis and puts it last: after all of them the order is the first one again.
            rotated = (rotated.view(count, factor.shape[0], -1).transpose(1, 2) @ factor).reshape(count, -1)
        return rotated.view(rows.shape)


def residual_rotation(spec: DecoderSpec, settings: TransformSettings) -> Rotation | None:
    """Return the rotation of the residual stream, None where there is none.

    Layer norms subtract the mean over the rotated coordinates, so for them the direction of ones stays where it is;
    signs would move it, and few Hadamard matrices fix it.
    """
    if not settings.rotates_residual:
        return None
    size = spec.hidden_size
    if spec.norm.kind == "layer":
        matrix = orthogonal_fixing_ones(size, settings.seed, _RESIDUAL)
        return Rotation(signs_M=torch.ones(size, dtype=torch.float64), factors=(matrix,))
    factors = hadamard_factors(size) if settings.residual_rotation == "hadamard" else None
    if factors is None:
        matrix = random_orthogonal(size, settings.seed, _RESIDUAL)
        return Rotation(signs_M=torch.ones(size, dtype=torch.float64), factors=(matrix,))
    return Rotation(signs_M=random_signs(size, settings.seed, _RESIDUAL), factors=factors)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueRotations:
    """The rotations of the value heads of all layers, made when they are needed.

    Attributes:
        kind, seed: how and from what they are made.
        spec: the model; they follow its heads.
    """

    kind: RotationKind
    seed: int
    spec: DecoderSpec

    def matrices(self, layer_index: int) -> torch.Tensor:
        """Return the rotations of one decoder layer, `[K, D, D]`, another one for each head."""
        size, heads = self.spec.head_dim, range(self.spec.num_kv_heads)
        if self.kind == "hadamard" and hadamard_factors(size) is not None:
            core_DD = hadamard(size)
            signs = [random_signs(size, self.seed, _VALUE, layer_index, head) for head in heads]
            return torch.stack([sign[:, None] * core_DD for sign in signs])
        return torch.stack([random_orthogonal(size, self.seed, _VALUE, layer_index, head) for head in heads])

    def rotate_rows(self, weight_OI: torch.Tensor, layer_index: int) -> torch.Tensor:
        """Return the value or fused linear with the rows of key/value head `k` multiplied by `R_k^T`."""
        matrices_KDD, rows_KD = self.matrices(layer_index), value_rows(self.spec)
        rotated_OI = weight_OI.clone()
        rotated_OI[rows_KD] = matrices_KDD.transpose(1, 2) @ weight_OI[rows_KD]
        return rotated_OI

    def rotate_columns(self, weight_OI: torch.Tensor, layer_index: int) -> torch.Tensor:
        """Return the output projection with the columns of each query head multiplied by its group's `R_k`."""
        spec = self.spec
        group = spec.num_heads // spec.num_kv_heads
        heads_NOD = weight_OI.view(-1, spec.num_heads, spec.head_dim).transpose(0, 1)
        matrices_NDD = self.matrices(layer_index).repeat_interleave(group, dim=0)
        return (heads_NOD @ matrices_NDD).transpose(0, 1).reshape(weight_OI.shape)


def value_rows(spec: DecoderSpec) -> torch.Tensor:
    """Return `[K, D]`: which rows of the linear that makes the values belong to which key/value head."""
    # Last of three or fused with the others.
    rows_KD = head_rows(spec, 2 if spec.qkv_layout == "split" else 0).value_KD
    assert rows_KD is not None
    return rows_KD
