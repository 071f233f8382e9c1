"""Linears whose weight stays quantized in memory and is multiplied by a kernel.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `P` planes, `W` 32-bit words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.binary_weight import BinaryWeight
from optgptq.kernels import KernelChoice, Matmul, choose_affine_matmul, choose_any_binary_matmul, choose_binary_matmul
from optgptq.kernels.native_affine import NativeAffine, fits_native, pack_native_affine
from optgptq.kernels.native_binary import NativeBinary, fits_native_binary, pack_native_binary
from optgptq.kernels.packed_affine import PackedAffine, fits_blocks, pack_affine
from optgptq.kernels.packed_binary import PackedBinary, arrange_codes, fits_words
from optgptq.packing.planes import pack_planes

Weight = TypeVar("Weight")


@dataclass(slots=True, eq=False, kw_only=True)
class QuantLinear(Generic[Weight]):
    """`x @ weight.T + bias`, callable in place of `optgptq.models.linear.Linear`.

    Attributes:
        weight: as the kernel takes it.
        bias_O: `[O]` or None.
        kernel: what multiplies, chosen once per model.
    """

    weight: Weight
    bias_O: torch.Tensor | None
    kernel: Matmul[Weight]

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        return self.kernel(x, self.weight, bias_O=self.bias_O)


def pack_binary(weight: BinaryWeight) -> PackedBinary:
    """Return the weight with one bit for each plane and weight, on its device, for kernels.

    Raises:
        FormatError: the border of two groups is inside a word of 32 columns (not `fits_words`).
    """
    alpha_OGP, offset_OG = weight.coefficients.values()
    narrow = all(torch.equal(values.to(torch.float16).to(torch.float32), values) for values in (alpha_OGP, offset_OG))
    dtype = torch.float16 if narrow else torch.float32
    order_I = weight.column_order_I
    return PackedBinary(
        planes_WPO=pack_planes(arrange_codes(weight.codes_OI, weight.group_size), weight.bits),
        alpha_GPO=alpha_OGP.permute(1, 2, 0).to(dtype).contiguous(),
        offset_GO=offset_OG.t().to(dtype).contiguous(),
        in_features=weight.in_features,
        group_size=weight.group_size,
        column_order_I=None if order_I is None else order_I.long(),
    )


# How what kernels take is made of a decoded weight on a device, and which weights can be.
_WEIGHT_TYPES: Mapping[type, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = MappingProxyType(
    {
        AffineWeight: (lambda weight: True, lambda weight: weight),
        PackedAffine: (fits_blocks, pack_affine),
        NativeAffine: (fits_native, pack_native_affine),
        PackedBinary: (lambda weight: fits_words(weight.in_features, weight.group_size), pack_binary),
        NativeBinary: (fits_native_binary, pack_native_binary),
    }
)


def hold_affine(
    weight: AffineWeight, choice: KernelChoice[Any], device: torch.device
) -> AffineWeight | PackedAffine | NativeAffine:
    """Return the weight on a device in the form that the kernel takes, which is made there."""
    _, pack = _WEIGHT_TYPES[choice.weight_type]
    held: AffineWeight | PackedAffine | NativeAffine = pack(weight.to(device))
    return held


def hold_binary(weight: BinaryWeight, choice: KernelChoice[Any], device: torch.device) -> PackedBinary | NativeBinary:
    """Return the weight in the form that the kernel takes, on a device; words are made where the weight is."""
    _, pack = _WEIGHT_TYPES[choice.weight_type]
    packed: PackedBinary | NativeBinary = pack(weight)
    return packed.to(device) if isinstance(packed, PackedBinary) else packed


def fits_kernel(weight: AffineWeight | BinaryWeight, choice: KernelChoice[Any]) -> bool:
    """True if the kernel multiplies with the weight."""
    fits, _ = _WEIGHT_TYPES[choice.weight_type]
    return fits(weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldKind:
    """How a kind of weight is held and multiplied.

    Attributes:
        parts: what a weight of this kind consists of, in the plural, for messages.
        choose: returns the kernel for a device and a dtype, and for exact activations with `exact=True`.
        choose_other: returns one for weights that do not fit that kernel; None: there is none.
        fits: True if a kernel can multiply with the decoded weight; one that fits none is held dense.
        hold: turns the decoded weight into what that kernel takes, on a device.
    """

    parts: str
    choose: Callable[..., KernelChoice[Any]]
    choose_other: Callable[[torch.device, torch.dtype], KernelChoice[Any]] | None = None
    fits: Callable[[Any, KernelChoice[Any]], bool]
    hold: Callable[[Any, KernelChoice[Any], torch.device], Any]


# A new kind of weight is one line here.
HELD_KINDS: Mapping[type, HeldKind] = MappingProxyType(
    {
        AffineWeight: HeldKind(parts="codes", choose=choose_affine_matmul, fits=fits_kernel, hold=hold_affine),
        BinaryWeight: HeldKind(
            parts="sign planes",
            choose=choose_binary_matmul,
            choose_other=choose_any_binary_matmul,
            fits=fits_kernel,
            hold=hold_binary,
        ),
    }
)
