"""Which transforms a job asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RotationKind = Literal["none", "hadamard", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformSettings:
    """What is done to the weights before anything is measured.

    Attributes:
        fold_norms: norm weights move into the linears that read them; that before the head only with a residual
            rotation.
        residual_rotation: one rotation of the residual stream. `hadamard` where a Hadamard matrix of the width is
            known and the norms are RMS norms, `random` orthogonal otherwise.
        value_rotation: one rotation per key/value head, between the value and the output projection.
        seed: of signs and random matrices.
    """

    fold_norms: bool = False
    residual_rotation: RotationKind = "none"
    value_rotation: RotationKind = "none"
    seed: int = 0

    @property
    def rotates_residual(self) -> bool:
        return self.residual_rotation != "none"

    @property
    def rotates_values(self) -> bool:
        return self.value_rotation != "none"

    @property
    def folds(self) -> bool:
        """Norms are folded: as asked, or because the residual is rotated, which a norm weight does not commute with."""
        return self.fold_norms or self.rotates_residual

    @property
    def changes_nothing(self) -> bool:
        return not (self.folds or self.rotates_values)
