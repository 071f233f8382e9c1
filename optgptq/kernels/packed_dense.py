"""Dense products on a processor with the weight laid out once: by loops of our own, else by oneDNN, which torch brings.

`torch.nn.functional.linear` lays the weight out again at each call, which costs more than the product while few tokens
are multiplied: with 4 to 16 tokens the packed product takes 0.4 to 0.6 of its time (EPYC, one thread, 1024 to 5632
features). The operations are those that torch's own compiler calls; they are named in this file only.
Our own loops take bfloat16 where the processor has AVX512_BF16 (`optgptq.native.dense_products`).

Shapes: `O` output rows, `I` input columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.native.dense_products import DenseTiles, dense_product, has_dense_products
from optgptq.native.dense_products import pack_dense as pack_tiles

# Layouts are chosen for this many tokens; others are multiplied with the same layout.
_TYPICAL_TOKENS = 16
# Below this many numbers a product with oneDNN's layout costs 15 microseconds a call more than it saves.
_SMALLEST_WEIGHT = 1 << 18


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


@dataclass(frozen=True, slots=True, eq=False)
class TiledDense:
    """The same with a weight in tiles. A token has the same bits in any batch.

    Attributes:
        weight: bfloat16.
        bias_O: float32 `[O]` or None.
    """

    weight: DenseTiles
    bias_O: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        return dense_product(x, self.weight, self.bias_O)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """True if this build of torch multiplies packed weights of `dtype` fast on `device`."""
    if device.type != "cpu":
        return False
    if dtype == torch.bfloat16 and has_dense_products():
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pays_to_pack(weight_OI: torch.Tensor) -> bool:
    """Say whether products get faster with a weight for which `packs` is true."""
    return weight_OI.numel() >= _SMALLEST_WEIGHT or (weight_OI.dtype == torch.bfloat16 and has_dense_products())


def pack_dense(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> PackedDense | TiledDense:
    """Return the packed weight, a copy; float32 or bfloat16 on a processor for which `packs` is true."""
    if weight_OI.dtype == torch.bfloat16 and has_dense_products():
        return TiledDense(pack_tiles(weight_OI.detach().contiguous()), None if bias_O is None else bias_O.float())
    with torch.inference_mode(mode=False):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), _TYPICAL_TOKENS)
    return PackedDense(packed, bias_O)
