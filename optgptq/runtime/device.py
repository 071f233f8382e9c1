"""The device a command computes on, checked before anything is loaded."""

from __future__ import annotations

import torch

from optgptq.checkpoint.source import TensorSource
from optgptq.errors import UsageError


def require_device(name: str) -> torch.device:
    """Return the device called `name`.

    Raises:
        UsageError: not a device of this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _unusable(name, "not the name of a device") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise _unusable(name, f"a {device.type} device, which optgptq has no kernels for")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise _unusable(name, f"{count} CUDA or HIP devices")
    return torch.device("cuda", device.index or 0)


def usable_devices() -> tuple[str, ...]:
    """Return the names that `require_device` accepts on this machine."""
    return ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))


def _unusable(name: str, found: str) -> UsageError:
    return UsageError(
        f"device {name}",
        expected=f"one of {', '.join(usable_devices())}",
        found=found,
        action="Name one of these with --device, or leave it out.",
    )


def compute_dtype(weights: torch.dtype, device: torch.device, *, wanted: str) -> torch.dtype:
    """Return the dtype in which a model with these weights is run for calibration.

    Args:
        weights: dtype of the model's weights.
        device: where it runs.
        wanted: `float32`, or `auto`: bfloat16 weights in bfloat16 where the processor multiplies it natively, weights
            of a GPU in their own dtype, everything else in float32. All of these hold the weights exactly.
    """
    if wanted == "float32" or weights not in (torch.bfloat16, torch.float16):
        return torch.float32
    if device.type != "cpu":
        return weights
    native = torch.cpu.get_capabilities().get("avx512_bf16", False) or torch.cpu.get_capabilities().get("bf16", False)
    return torch.bfloat16 if weights == torch.bfloat16 and native else torch.float32


def run_dtype(folder: TensorSource, device: torch.device, *, wanted: str) -> torch.dtype:
    """Return the dtype in which an engine runs a model.

    Args:
        folder: the checkpoint.
        device: where it runs.
        wanted: the name of a dtype, or `auto`: float32 on a processor; on a GPU bfloat16 where any weight is stored so,
            or in float32, and float16 else.
    """
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]
    if device.type == "cpu":
        return torch.float32
    stored = {info.dtype for info in folder.tensors.values()}
    return torch.float16 if "F16" in stored and not stored & {"BF16", "F32"} else torch.bfloat16
