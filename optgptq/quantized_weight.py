"""The narrow waist: what solvers make, formats store and kernels multiply with.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self

import torch

from optgptq.layout import LinearLayout


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

    @property
    def scale_dtype(self) -> torch.dtype:
        """Floating dtype of what is stored beside the codes."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight `[O, I]` in the model's own column order: the truth for every kernel."""

    def rows(self, begin: int, end: int) -> Self:
        """Return rows `begin .. end`; the tensors are views."""

    def select(self, rows_O: torch.Tensor) -> Self:
        """Return the rows with these numbers, in this order."""

    @classmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        """Return weights that differ in their rows only as one, row below row."""

    def to(self, device: torch.device | str) -> Self:
        """Return the weight on another device."""

    def digest_parts(self) -> Iterator[torch.Tensor]:
        """Yield everything that `dequantize` depends on, in dtypes that do not depend on how it is stored."""

    def scales_fit(self, dtype: torch.dtype) -> bool:
        """True if `dtype` holds every scale, or floating coefficient, exactly."""

    def with_scale_dtype(self, dtype: torch.dtype) -> Self:
        """Return the same weight with its scales in another dtype; ValueError where that would round one."""

    def laid_out(self, layout: LinearLayout) -> LinearLayout:
        """Return `layout` with what the weight itself decides: whether it is symmetric, and its coefficients."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield what is wrong with the values beside the codes: which of them, what was expected, what was found."""

    def stored_bits(self, *, zero_points_stored: bool) -> int:
        """Return the bits that codes and grids take, without padding to words.

        Args:
            zero_points_stored: zero points take room; weights without them ignore it.
        """
