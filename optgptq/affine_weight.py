"""Weights on uniform grids.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.layout import LinearLayout


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AffineWeight:
    """A weight on uniform grids: `weight[o, i] = scale[o, g(i)] * (code[o, i] - zero_point[o, g(i)])`.

    Attributes:
        codes_OI: uint8 `[O, I]`, each in `0 .. 2**bits - 1`, columns in the model's own order.
        scale_OG: `[O, G]` in the dtype that a checkpoint stores (float16, bfloat16 or float32).
        zero_point_OG: int32 `[O, G]`, in code units, `0 .. 2**bits`.
        bits: 1 to 8.
        group_size: columns in a group; `I` when one group spans the row. The last group may be shorter.
        symmetric: every zero point is `2**(bits - 1)`.
        group_index_I: int32 `[I]`, the group of each column, for act-order checkpoints made elsewhere;
            None means column `i` belongs to group `i // group_size`.
    """

    codes_OI: torch.Tensor
    scale_OG: torch.Tensor
    zero_point_OG: torch.Tensor
    bits: int
    group_size: int
    symmetric: bool
    group_index_I: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes_OI.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes_OI.shape[1]

    @property
    def num_groups(self) -> int:
        return self.scale_OG.shape[1]

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.scale_OG.dtype

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight `[O, I]`. The product is taken in float32, then cast: this is the truth for all kernels."""
        scale_OG = self.scale_OG.to(torch.float32)
        if self.group_index_I is None and self.in_features == self.num_groups * self.group_size:
            # [O, I] as [O, G, columns of a group]: no scale is gathered for each single column.
            codes_OGL = self.codes_OI.reshape(self.out_features, self.num_groups, -1)
            steps_OGL = codes_OGL.to(torch.int32) - self.zero_point_OG[:, :, None]
            return steps_OGL.to(torch.float32).mul_(scale_OG[:, :, None]).reshape(self.codes_OI.shape).to(dtype)
        index_I = self.group_index_I
        if index_I is None:
            index_I = torch.arange(self.in_features, device=self.codes_OI.device) // self.group_size
        index_I = index_I.long()
        steps_OI = self.codes_OI.to(torch.int32) - self.zero_point_OG[:, index_I]
        return steps_OI.to(torch.float32).mul_(scale_OG[:, index_I]).to(dtype)

    def rows(self, begin: int, end: int) -> AffineWeight:
        """Return rows `begin .. end`; the tensors are views."""
        return self._map_rows(lambda tensor: tensor[begin:end])

    def select(self, rows_O: torch.Tensor) -> AffineWeight:
        """Return the rows with these numbers, in this order."""
        return self._map_rows(lambda tensor: tensor[rows_O])

    def stacks_with(self, other: AffineWeight) -> bool:
        """True if `stacked` may join the two: they differ in their rows only."""
        mine_I, its_I = self.group_index_I, other.group_index_I
        same_order = mine_I is its_I or (mine_I is not None and its_I is not None and torch.equal(mine_I, its_I))
        return same_order and (self.bits, self.group_size, self.in_features, self.scale_dtype) == (
            other.bits,
            other.group_size,
            other.in_features,
            other.scale_dtype,
        )

    @classmethod
    def stacked(cls, parts: Sequence[AffineWeight]) -> AffineWeight:
        """Return weights that differ in their rows only as one, row below row."""
        return replace(
            parts[0],
            codes_OI=torch.cat([part.codes_OI for part in parts]),
            scale_OG=torch.cat([part.scale_OG for part in parts]),
            zero_point_OG=torch.cat([part.zero_point_OG for part in parts]),
        )

    def to(self, device: torch.device | str) -> AffineWeight:
        """Return the weight on another device."""
        index_I = self.group_index_I
        return replace(
            self,
            codes_OI=self.codes_OI.to(device),
            scale_OG=self.scale_OG.to(device),
            zero_point_OG=self.zero_point_OG.to(device),
            group_index_I=None if index_I is None else index_I.to(device),
        )

    def digest_parts(self) -> Iterator[torch.Tensor]:
        """Yield codes, scales in float32 whatever stores them, zero points, and the group of each column."""
        index_I = self.group_index_I
        if index_I is None:
            index_I = torch.arange(self.in_features) // self.group_size
        yield self.codes_OI.to(torch.uint8)
        yield self.scale_OG.to(torch.float32)
        yield self.zero_point_OG.to(torch.int32)
        yield index_I.to(torch.int32)

    def scales_fit(self, dtype: torch.dtype) -> bool:
        """True if `dtype` holds every scale exactly."""
        return torch.equal(self.scale_OG.to(dtype).to(torch.float32), self.scale_OG.to(torch.float32))

    def with_scale_dtype(self, dtype: torch.dtype) -> AffineWeight:
        """Return the same weight with its scales in another dtype, which must hold them exactly."""
        if not self.scales_fit(dtype):
            raise ValueError(f"scales are not exact in {dtype}")
        return replace(self, scale_OG=self.scale_OG.to(dtype))

    def laid_out(self, layout: LinearLayout) -> LinearLayout:
        """Return `layout` with what the weight itself decides."""
        return replace(layout, symmetric=self.symmetric, coefficients=None)

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield what is wrong with the scales: which values, what was expected, what was found."""
        num_bad = int((~torch.isfinite(self.scale_OG)).sum())
        if num_bad:
            yield "scales", "finite values", f"{num_bad} that are NaN or infinite"

    def stored_bits(self, *, zero_points_stored: bool) -> int:
        """Return the bits that codes, scales and (where stored) zero points take, without padding to words."""
        bits = self.codes_OI.numel() * self.bits + self.scale_OG.numel() * self.scale_OG.element_size() * 8
        return bits + (self.zero_point_OG.numel() * self.bits if zero_points_stored else 0)

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> AffineWeight:
        return replace(
            self,
            codes_OI=change(self.codes_OI),
            scale_OG=change(self.scale_OG),
            zero_point_OG=change(self.zero_point_OG),
        )
