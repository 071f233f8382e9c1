"""The threads of torch's own OpenMP library, for the native library to work with."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch


def torch_team() -> int | None:
    """Return the address of `GOMP_parallel` in the OpenMP library that torch runs on; None where there is none.

    libgomp has it, and Intel's and LLVM's libraries on Linux have it too. It is looked up through torch's own library,
    so that it is the one which torch calls, whatever else is loaded; nothing is loaded that was not.
    """
    if sys.platform != "linux":
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        parallel = loaded.GOMP_parallel
    except (OSError, AttributeError):  # torch is built in another way, or without OpenMP
        return None
    return ctypes.cast(parallel, ctypes.c_void_p).value
