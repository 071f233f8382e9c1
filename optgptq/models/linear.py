"""The smallest linear: a weight, perhaps a bias, and a call. Whatever has the same call can take its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F  # noqa: N812

from optgptq.native.dense_products import dense_product, pack_dense, takes_dense


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
        if takes_dense(x, self.weight_OI):
            return dense_product(x, pack_dense(self.weight_OI), self.bias_O)
        return F.linear(x, self.weight_OI, self.bias_O)
