"""Dense products on a processor with the weight laid out once for them, by oneDNN, which torch brings.

`torch.nn.functional.linear` lays the weight out again at each call, which costs more than the product while few tokens
are multiplied: with 4 to 16 tokens the packed product takes 0.4 to 0.6 of its time (EPYC, one thread, 1024 to 5632
features). The operations are those that torch's own compiler calls; they are named in this file only.

Shapes: `O` output rows, `I` input columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Layouts are chosen for this many tokens; others are multiplied with the same layout.
_TYPICAL_TOKENS = 16


@dataclass(frozen=True, slots=True, eq=False)
class PackedDense:
    """`x @ weight.T + bias`, callable in place of `optgptq.models.linear.Linear`.

    Attributes:
        weight: `[O, I]` in a layout of oneDNN's own; nothing else can read it.
        bias_O: `[O]` or None.
    """

    weight: torch.Tensor
    bias_O: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias_O, "none", [], "")
        return product


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """True if this build of torch multiplies packed weights of `dtype` fast on `device`."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_dense(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> PackedDense:
    """Return the packed weight, a copy; float32 or bfloat16 on a processor for which `packs` is true."""
    with torch.inference_mode(mode=False):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), _TYPICAL_TOKENS)
    return PackedDense(packed, bias_O)
