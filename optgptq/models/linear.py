"""The smallest linear: a weight, perhaps a bias, and a call. Whatever has the same call can take its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F  # noqa: N812


class LinearLike(Protocol):
    """`[..., I] -> [..., O]`; the dense `Linear` below and the runtime's quantized one.

    The result is fresh memory that the caller may overwrite; the input is left as it is.
    """

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...


@dataclass(slots=True, eq=False)
class Linear:
    """`x @ weight_OI.T + bias_O`; the weight may be replaced in place of the object.

    Attributes:
        weight_OI: `[O, I]`, whatever way the checkpoint stores it.
        bias_O: `[O]` or None.
    """

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        return F.linear(x, self.weight_OI, self.bias_O)
