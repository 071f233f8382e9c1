"""Weights as sums of signs: binary coding.

`weight[o, i] = offset[o, g(i)] + sum_p coefficient[o, g(i), p] * sign[p, o, i]` with signs of +1 and -1. A uniform grid
of `P` bits is the special case `coefficient_p = scale * 2**p / 2`, `offset = scale * ((2**P - 1) / 2 - zero_point)`,
up to the order of the planes.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `P` planes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.coefficients import Coefficients
from optgptq.layout import LinearLayout


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class BinaryWeight:
    """A weight in binary coding.

    Attributes:
        codes_OI: uint8 `[O, I]`; bit `p` of a code is set where the sign of plane `p` is +1.
        coefficients: of every group.
        bits: planes `P`, 1 to 8.
        group_size: columns in a group; `I` when one group spans the row. The last group may be shorter.
        column_order_I: int32 `[I]`, the model's column that each column of `codes_OI` stands for; None: they are in
            the model's own order. Groups are contiguous in the order of `codes_OI`.
    """

    codes_OI: torch.Tensor
    coefficients: Coefficients
    bits: int
    group_size: int
    column_order_I: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows `O`."""
        return self.codes_OI.shape[0]

    @property
    def in_features(self) -> int:
        """Columns `I`."""
        return self.codes_OI.shape[1]

    @property
    def num_groups(self) -> int:
        """Groups `G` of a row."""
        return -(-self.in_features // self.group_size)

    @property
    def scale_dtype(self) -> torch.dtype:
        """The floating dtype of coefficients and scales."""
        return next(iter(self._floats())).dtype

    def levels(self) -> torch.Tensor:
        """Return what each code stands for, `[O, G, 2**P]`: the offset, then plane by plane, summed in float32."""
        alpha_OGP, offset_OG = self.coefficients.values()
        codes_C = torch.arange(1 << self.bits, device=alpha_OGP.device)
        levels_OGC = offset_OG[:, :, None].expand(-1, -1, 1 << self.bits)
        for plane in range(self.bits):
            sign_C = (codes_C >> plane & 1) * 2 - 1
            levels_OGC = levels_OGC + alpha_OGP[:, :, plane, None] * sign_C
        return levels_OGC

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight `[O, I]` in the model's column order; sums in float32, then cast: the truth of kernels."""
        levels_OGC = self.levels().to(dtype)
        dense_OI = torch.empty(self.codes_OI.shape, dtype=dtype, device=self.codes_OI.device)
        for group in range(self.num_groups):
            columns = slice(group * self.group_size, (group + 1) * self.group_size)
            dense_OI[:, columns] = levels_OGC[:, group].gather(1, self.codes_OI[:, columns].long())
        if self.column_order_I is None:
            return dense_OI
        ordered_OI = torch.empty_like(dense_OI)
        ordered_OI[:, self.column_order_I.long()] = dense_OI
        return ordered_OI

    def select(self, rows_O: torch.Tensor) -> BinaryWeight:
        """Return the rows with these numbers, in this order."""
        return self._map(lambda tensor: tensor[rows_O])

    @classmethod
    def stacked(cls, parts: Sequence[BinaryWeight]) -> BinaryWeight:
        """Return weights that differ in their rows only as one, row below row."""
        kind = type(parts[0].coefficients)
        stored = zip(*(part.coefficients.tensors() for part in parts), strict=True)
        return replace(
            parts[0],
            codes_OI=torch.cat([part.codes_OI for part in parts]),
            coefficients=kind(*(torch.cat(tensors) for tensors in stored)),
        )

    def rows(self, begin: int, end: int) -> BinaryWeight:
        """Return rows `begin .. end`; the tensors are views."""
        return self._map(lambda tensor: tensor[begin:end])

    def to(self, device: torch.device | str) -> BinaryWeight:
        """Return the weight on another device."""
        order_I = self.column_order_I
        return replace(
            self._map(lambda tensor: tensor.to(device)), column_order_I=None if order_I is None else order_I.to(device)
        )

    def digest_parts(self) -> Iterator[torch.Tensor]:
        """Yield everything that `dequantize` depends on; float32 coefficients, whatever the dtype that stores them."""
        yield self.codes_OI
        yield from self.coefficients.values()
        order_I = self.column_order_I
        yield torch.arange(self.in_features, dtype=torch.int32) if order_I is None else order_I.to(torch.int32)

    def stored_bits(self, *, zero_points_stored: bool) -> int:
        """Return the bits that planes and coefficients take, without padding to words; there are no zero points."""
        del zero_points_stored
        order = () if self.column_order_I is None else (self.column_order_I,)
        stored = (*self.coefficients.tensors(), *order)
        num_bytes: int = sum(tensor.nbytes for tensor in stored)
        return self.codes_OI.numel() * self.bits + 8 * num_bytes

    def scales_fit(self, dtype: torch.dtype) -> bool:
        """True if `dtype` holds every floating coefficient and scale exactly."""
        return all(torch.equal(tensor.to(dtype).double(), tensor.double()) for tensor in self._floats())

    def with_scale_dtype(self, dtype: torch.dtype) -> BinaryWeight:
        """Return the same weight with its floating coefficients in another dtype, which must hold them exactly."""
        if not self.scales_fit(dtype):
            raise ValueError(f"coefficients are not exact in {dtype}")
        coefficients = self.coefficients.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        return replace(self, coefficients=coefficients)

    def laid_out(self, layout: LinearLayout) -> LinearLayout:
        """Return `layout` with what the weight itself decides."""
        return replace(layout, symmetric=False, coefficients=self.coefficients.storage)

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield what is wrong with the values that are not codes: which of them, what was expected, what was found."""
        yield from self.coefficients.problems()
        order_I = self.column_order_I
        if order_I is None:
            return
        every_I = torch.arange(self.in_features, device=order_I.device)
        if not torch.equal(order_I.long().sort().values, every_I):
            num_distinct = len(set(order_I.tolist()))
            found = f"{num_distinct} distinct columns from {int(order_I.min())} to {int(order_I.max())}"
            yield "column order", f"each of {self.in_features} columns once", found

    def _floats(self) -> list[torch.Tensor]:
        return [tensor for tensor in self.coefficients.tensors() if tensor.is_floating_point()]

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BinaryWeight:
        """Return the weight with `change` applied to every tensor that has rows."""
        return replace(self, codes_OI=change(self.codes_OI), coefficients=self.coefficients.map(change))
