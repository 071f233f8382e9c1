"""The coefficients of binary codes, in the three ways in which they are stored.

Shapes: `O` output rows, `G` groups along the input columns, `P` planes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch

from optgptq.layout import CoefficientStorage


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
        alpha_OGP: not negative, planes in any order; float16, bfloat16 or float32.
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
