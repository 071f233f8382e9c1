"""What the sizes of triton's programs depend on besides shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """HIP or CUDA, and threads of a wave or warp; never the name of an architecture."""

    is_hip: bool
    wave_size: int


def device_kind(device: torch.device) -> DeviceKind:
    """Return the kind of a GPU; on a processor triton's interpreter runs what would be compiled for CUDA."""
    if device.type != "cuda":
        return DeviceKind(is_hip=False, wave_size=32)
    wave_size: int = torch.cuda.get_device_properties(device).warp_size
    return DeviceKind(is_hip=torch.version.hip is not None, wave_size=wave_size)
