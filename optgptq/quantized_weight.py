"""The narrow waist: what solvers make, formats store and kernels multiply with.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, Self

import torch


class QuantizedWeight(Protocol):
    """A weight of few bits. `AffineWeight` has uniform grids, `BinaryWeight` has sums of signs."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def group_size(self) -> int:
        """Columns that share a grid; `I` when one group spans the row."""

    @property
    def out_features(self) -> int:
        """Rows `O`."""

    @property
    def in_features(self) -> int:
        """Columns `I`."""

    @property
    def num_groups(self) -> int:
        """Groups `G` of a row."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight `[O, I]` in the model's own column order: the truth for every kernel."""

    def rows(self, begin: int, end: int) -> Self:
        """Return rows `begin .. end`; the tensors are views."""

    def to(self, device: torch.device | str) -> Self:
        """Return the weight on another device."""

    def digest_parts(self) -> Iterator[torch.Tensor]:
        """Yield everything that `dequantize` depends on, in dtypes that do not depend on how it is stored."""

    def stored_bits(self, *, zero_points_stored: bool) -> int:
        """Return the bits that codes and grids take, without padding to words.

        Args:
            zero_points_stored: zero points take room; weights without them ignore it.
        """
