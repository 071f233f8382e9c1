"""One signature per operation; which implementation runs is a function of device and dtype, decided once per model.

A caller chooses with `choose_affine_matmul(...)` or `choose_binary_matmul(...)`, logs the choice's `reason`, and passes
`choice.call` on; there is no global switch, so a test overrides the kernel by passing another callable.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Generic, Protocol, TypeVar

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.kernels.binary import binary_matmul
from optgptq.kernels.native_affine import NativeAffine, exact_affine_matmul, native_affine_matmul, takes_native
from optgptq.kernels.native_binary import NativeBinary, exact_binary_matmul, native_binary_matmul
from optgptq.kernels.packed_affine import PackedAffine
from optgptq.kernels.packed_binary import PackedBinary
from optgptq.kernels.reference import affine_matmul
from optgptq.native.products import product_paths

# Said where plain torch runs on a processor.
_LOST_NATIVE = "the compiled products, many times as fast, are not there: install where there is a C++ compiler"

Weight = TypeVar("Weight")
WeightTaken = TypeVar("WeightTaken", contravariant=True)


class Matmul(Protocol[WeightTaken]):
    """`x [..., I]` times a quantized weight `[O, I]`, plus a bias `[O]`, gives `[..., O]` in the dtype of `x`."""

    def __call__(self, x: torch.Tensor, weight: WeightTaken, *, bias_O: torch.Tensor | None = None) -> torch.Tensor: ...


AffineMatmul = Matmul[AffineWeight] | Matmul[PackedAffine] | Matmul[NativeAffine]
BinaryMatmul = Matmul[PackedBinary] | Matmul[NativeBinary]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice(Generic[Weight]):
    """An implementation and why it was taken.

    Attributes:
        operation: what it computes.
        name: which implementation.
        reason: one sentence for the log and for `optgptq doctor`.
        call: the implementation.
        weight_type: what it takes as a weight: `optgptq.runtime.linear` makes that of the decoded weight.
        is_makeshift: there is a faster one for the device, which cannot run here; worth a warning.
    """

    operation: str
    name: str
    reason: str
    call: Matmul[Weight]
    weight_type: type[Weight]
    is_makeshift: bool = False


def choose_affine_matmul(
    device: torch.device, dtype: torch.dtype, *, exact: bool = False
) -> KernelChoice[AffineWeight] | KernelChoice[PackedAffine] | KernelChoice[NativeAffine]:
    """Return the kernel that multiplies with affine weights on `device` in `dtype`; plain torch runs anywhere.

    That of triton runs on CUDA and HIP devices, both of which torch calls `cuda`; triton is imported here, if at all.
    The compiled one of a processor rounds activations to 8 bits, unless they have to stay `exact`.
    """
    plain = f"plain torch (dequantize, then matmul) on {_place(device, dtype)}"
    if takes_native(device, dtype):
        return _native_affine_matmul(_place(device, dtype), exact=exact)
    if device.type != "cuda":
        return _plain_affine_matmul(f"{plain}: {_LOST_NATIVE}", is_makeshift=device.type == "cpu")
    if dtype not in (torch.float16, torch.bfloat16):
        return _plain_affine_matmul(f"{plain}: the triton kernel takes float16 and bfloat16", is_makeshift=True)
    if find_spec("triton") is None:
        lost = "triton, whose kernel is faster, is not installed: `pip install optgptq[triton]`"
        return _plain_affine_matmul(f"{plain}: {lost}", is_makeshift=True)
    from optgptq.kernels import triton_affine

    words = f"packed codes on the matrix units of {_place(device, dtype)}"
    most = triton_affine.MOST_MATRIX_TOKENS
    return KernelChoice(
        operation="affine_matmul",
        name="triton",
        reason=f"{words}; made dense once per call for more than {most} tokens",
        call=triton_affine.affine_matmul,
        weight_type=PackedAffine,
    )


def _native_affine_matmul(place: str, *, exact: bool) -> KernelChoice[NativeAffine]:
    return KernelChoice(
        operation="affine_matmul",
        name=product_paths()[0],
        reason=f"compiled products with packed codes on {place}, {_numbers(exact=exact)}",
        call=exact_affine_matmul if exact else native_affine_matmul,
        weight_type=NativeAffine,
    )


def _plain_affine_matmul(reason: str, *, is_makeshift: bool) -> KernelChoice[AffineWeight]:
    return KernelChoice(
        operation="affine_matmul",
        name="reference",
        reason=reason,
        call=affine_matmul,
        weight_type=AffineWeight,
        is_makeshift=is_makeshift,
    )


def choose_binary_matmul(
    device: torch.device, dtype: torch.dtype, *, exact: bool = False
) -> KernelChoice[PackedBinary] | KernelChoice[NativeBinary]:
    """Return the kernel that multiplies with sign planes on `device` in `dtype`.

    That of triton runs on CUDA and HIP devices, both of which torch calls `cuda`; triton is imported here, if at all.
    The compiled one of a processor rounds activations to 8 bits, unless they have to stay `exact`.
    """
    plain = f"plain torch (unpack a few rows, then matmul) on {_place(device, dtype)}"
    if takes_native(device, dtype):
        return _native_binary_matmul(_place(device, dtype), exact=exact)
    if device.type != "cuda":
        return _plain_binary_matmul(f"{plain}: {_LOST_NATIVE}", is_makeshift=device.type == "cpu")
    if dtype not in (torch.float16, torch.bfloat16):
        return _plain_binary_matmul(f"{plain}: the triton kernel takes float16 and bfloat16", is_makeshift=True)
    if find_spec("triton") is None:
        lost = "triton, whose kernel is faster, is not installed: `pip install optgptq[triton]`"
        return _plain_binary_matmul(f"{plain}: {lost}", is_makeshift=True)
    from optgptq.kernels import triton_binary

    return KernelChoice(
        operation="binary_matmul",
        name="triton",
        reason=f"sign planes on the matrix units of {_place(device, dtype)}; unpacked once per call from "
        f"{triton_binary.DENSE_FROM_TOKENS} tokens on",
        call=triton_binary.binary_matmul,
        weight_type=PackedBinary,
    )


def _native_binary_matmul(place: str, *, exact: bool) -> KernelChoice[NativeBinary]:
    return KernelChoice(
        operation="binary_matmul",
        name=product_paths()[0],
        reason=f"compiled products with sign planes on {place}, {_numbers(exact=exact)}",
        call=exact_binary_matmul if exact else native_binary_matmul,
        weight_type=NativeBinary,
    )


def choose_any_binary_matmul(device: torch.device, dtype: torch.dtype) -> KernelChoice[PackedBinary]:
    """Return the kernel for weights that the chosen one does not take: planes in words, by plain torch."""
    reason = f"plain torch (unpack a few rows, then matmul) on {_place(device, dtype)}: takes any number of planes"
    return _plain_binary_matmul(reason, is_makeshift=True)


def _plain_binary_matmul(reason: str, *, is_makeshift: bool) -> KernelChoice[PackedBinary]:
    return KernelChoice(
        operation="binary_matmul",
        name="torch",
        reason=reason,
        call=binary_matmul,
        weight_type=PackedBinary,
        is_makeshift=is_makeshift,
    )


def _numbers(*, exact: bool) -> str:
    return "activations as they are" if exact else "activations in 8 bits with a scale for each 32"


def _place(device: torch.device, dtype: torch.dtype) -> str:
    return f"{device.type} in {str(dtype).removeprefix('torch.')}"
