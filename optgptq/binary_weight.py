"""Weights as sums of signs: binary coding.

`weight[o, i] = offset[o, g(i)] + sum_p coefficient[o, g(i), p] * sign[p, o, i]` with signs of +1 and -1. A uniform grid
of `P` bits is the special case `coefficient_p = scale * 2**p / 2`, `offset = scale * ((2**P - 1) / 2 - zero_point)`,
up to the order of the planes.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `P` planes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch

from optgptq.layout import CoefficientStorage, LinearLayout


class Coefficients(Protocol):
    """Coefficients and offsets of every group, in one of the ways in which they are stored."""

    @property
    def storage(self) -> CoefficientStorage:
        """Return the name of the way."""

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return coefficients `[O, G, P]` and offsets `[O, G]` in float32."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return what is stored; the first dimension of each is `O`."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Return the same with `change` applied to every stored tensor."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield what is wrong with the stored values: which of them, what was expected, what was found."""


@dataclass(frozen=True, slots=True, eq=False)
class FloatCoefficients:
    """Coefficients as they are.

    Attributes:
        alpha_OGP: positive, descending along `P`; float16, bfloat16 or float32.
        offset_OG: in the same dtype.
    """

    alpha_OGP: torch.Tensor
    offset_OG: torch.Tensor

    @property
    def storage(self) -> CoefficientStorage:
        return "float"

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.alpha_OGP.to(torch.float32), self.offset_OG.to(torch.float32)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.alpha_OGP, self.offset_OG

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> FloatCoefficients:
        return FloatCoefficients(change(self.alpha_OGP), change(self.offset_OG))

    def problems(self) -> Iterator[tuple[str, str, str]]:
        yield from _finite("coefficients", self.alpha_OGP, above="not negative")
        yield from _finite("offsets", self.offset_OG)


@dataclass(frozen=True, slots=True, eq=False)
class ByteCoefficients:
    """Coefficients as bytes, in units of one scale for each row.

    Attributes:
        alpha_OGP: int8, not negative.
        offset_OG: int8.
        row_scale_O: float16, bfloat16 or float32.
    """

    alpha_OGP: torch.Tensor
    offset_OG: torch.Tensor
    row_scale_O: torch.Tensor

    @property
    def storage(self) -> CoefficientStorage:
        return "int8"

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale_O = self.row_scale_O.to(torch.float32)
        return self.alpha_OGP * scale_O[:, None, None], self.offset_OG * scale_O[:, None]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.alpha_OGP, self.offset_OG, self.row_scale_O

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ByteCoefficients:
        return ByteCoefficients(change(self.alpha_OGP), change(self.offset_OG), change(self.row_scale_O))

    def problems(self) -> Iterator[tuple[str, str, str]]:
        yield from _finite("coefficients", self.alpha_OGP, above="not negative")
        yield from _finite("row scales", self.row_scale_O, above="positive")


@dataclass(frozen=True, slots=True, eq=False)
class StepCoefficients:
    """One shape for each row, and a scale for each group: `coefficient = scale * step / 2`.

    Attributes:
        steps_OP: uint8, positive.
        scale_OG: float16, bfloat16 or float32.
        offset_OG: in the same dtype.
    """

    steps_OP: torch.Tensor
    scale_OG: torch.Tensor
    offset_OG: torch.Tensor

    @property
    def storage(self) -> CoefficientStorage:
        return "steps"

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        half_OG = self.scale_OG.to(torch.float32) / 2
        return half_OG[:, :, None] * self.steps_OP[:, None, :], self.offset_OG.to(torch.float32)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.steps_OP, self.scale_OG, self.offset_OG

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> StepCoefficients:
        return StepCoefficients(change(self.steps_OP), change(self.scale_OG), change(self.offset_OG))

    def problems(self) -> Iterator[tuple[str, str, str]]:
        yield from _finite("steps", self.steps_OP, above="positive")
        yield from _finite("scales", self.scale_OG, above="not negative")
        yield from _finite("offsets", self.offset_OG)


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
        return self.codes_OI.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes_OI.shape[1]

    @property
    def num_groups(self) -> int:
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


def _finite(
    part: str, tensor: torch.Tensor, *, above: Literal["positive", "not negative"] | None = None
) -> Iterator[tuple[str, str, str]]:
    """Yield the problem of values that are not finite or not `above`; nothing when all are."""
    good = torch.isfinite(tensor)
    if above is not None:
        good &= tensor > 0 if above == "positive" else tensor >= 0
    num_bad = int((~good).sum())
    if num_bad:
        expected = "finite values" if above is None else f"finite values that are {above}"
        yield part, expected, f"{num_bad} of {tensor.numel()} that are not"
