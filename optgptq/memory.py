"""Memory of this process and of the machine, read from the operating system; no dependency, no torch."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

# What messages of a plain RuntimeError say where memory ran out: torch's allocator on the processor, cuBLAS, cuDNN.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory", "_STATUS_ALLOC_FAILED")
# M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's malloc.h, in bytes.
_ALLOCATOR_OPTIONS = ((-3, 1 << 30), (-1, 2**31 - 1), (-2, 1 << 26))


def _proc_bytes(path: Path, field: str) -> int | None:
    """Return a `field:  N kB` line of a /proc file in bytes; None where the file or the line is missing."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process so far.

    `VmHWM` comes first: `ru_maxrss` survives exec on Linux, so a process started by a large parent reports the parent.
    """
    high_water = _proc_bytes(Path("/proc/self/status"), "VmHWM")
    if high_water is not None:
        return high_water
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory_bytes() -> int | None:
    """Return the resident memory of this process now; None where the system does not tell."""
    return _proc_bytes(Path("/proc/self/status"), "VmRSS")


def total_memory_bytes() -> int:
    """Return the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory_bytes() -> int | None:
    """Return what can be allocated without swapping, under the control group's limit where there is one."""
    available = _proc_bytes(Path("/proc/meminfo"), "MemAvailable")
    limit, used = _control_group_bytes("memory.max"), _control_group_bytes("memory.current")
    if limit is None or used is None:
        return available
    left = max(limit - used, 0)
    return left if available is None else min(left, available)


def _control_group_bytes(name: str) -> int | None:
    """Return a number of the version-2 control group; None for `max`, or where there is no such group."""
    try:
        text = Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def memory_limit_bytes() -> int:
    """Return the machine's memory, or the limit of the version-2 control group where that is less."""
    limit = _control_group_bytes("memory.max")
    return total_memory_bytes() if limit is None else min(limit, total_memory_bytes())


def oom_kills() -> int | None:
    """Return how many processes of this control group (version 2) were killed for want of memory; None if untold."""
    try:
        lines = Path("/sys/fs/cgroup/memory.events").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    counts = [words[1] for words in map(str.split, lines) if len(words) == 2 and words[0] == "oom_kill"]
    return int(counts[0]) if counts and counts[0].isdigit() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the processor or of an accelerator."""
    if isinstance(error, MemoryError):
        return True
    # The class of torch by its name: this module loads no torch. A processor's allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(part in str(error) for part in _OUT_OF_MEMORY)
    )


def smaller_batch(error: BaseException, size: int) -> int:
    """Return half of `size`, the batch to try after `error`; raise the error where nothing smaller would help."""
    if size <= 1 or not is_out_of_memory(error):
        raise error
    return size // 2


def keep_freed_memory() -> None:
    """Let freed tensors be used again instead of giving each back to the system, where the C library can (glibc).

    The system clears fresh memory page by page at its first use. What a decoder layer leaves behind is given back after
    it, by `return_free_memory`.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for option, num_bytes in _ALLOCATOR_OPTIONS:
            library.mallopt(option, num_bytes)


def return_free_memory() -> None:
    """Give free memory back to the system where the C library can (glibc); elsewhere nothing happens.

    Freed tensors of a decoder layer leave a heap full of holes, and the next layer's do not fit them: without this the
    peak crept up from layer to layer.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
