"""The device a command computes on, checked before anything is loaded."""

from __future__ import annotations

import torch

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
