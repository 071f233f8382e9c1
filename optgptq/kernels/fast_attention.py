"""Where attention has a fast implementation, and why it does not run: for exact pages and for those of codes."""

from __future__ import annotations

from importlib.util import find_spec

import torch

FAST_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Wider heads were compiled too: programs that take all segments then keep registers in memory.
WIDEST_HEAD = 256


def takes_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Say whether triton's kernels run: on CUDA and HIP devices, which torch both calls `cuda`."""
    return device.type == "cuda" and dtype in FAST_TYPES and what_is_lost(device, dtype, head_dim) is None


def what_is_lost(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why a faster implementation that there is for the device does not run; None where there is none."""
    if dtype not in FAST_TYPES:
        return None
    if device.type == "cpu":
        return "the compiled loops, which are faster, are not built"
    if device.type != "cuda":
        return None
    if head_dim > WIDEST_HEAD:
        return f"the triton kernels, which are faster, take heads of up to {WIDEST_HEAD} features"
    if find_spec("triton") is None:
        return "triton, whose kernels are faster, is not installed: `pip install optgptq[triton]`"
    return None
