"""The shared object with the compiled inner loops: found, loaded and described.

It is built with the package where there is a C++ compiler (`source/`); without it torch does the same work.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal

from optgptq.native.team import torch_team

Backend = Literal["auto", "torch", "portable", "avx2", "avx512"]
"""Who runs an inner loop: the fastest there is, torch, or the compiled code for one instruction set."""

# The numbers are those of `source/interface.cpp`; the fastest comes first.
PATHS = {"avx512": 2, "avx2": 1, "portable": 0}
# Ways to add products of bfloat16 numbers, of the same bits; the numbers are those of `source/bfloat16_pairs.hpp`.
PAIR_WAYS = {"faster": 0, "instruction": 1, "widened": 2}
PairWay = Literal["faster", "instruction", "widened"]
_FOLDER = Path(__file__).parent
_NO_MEMORY = 1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Library:
    """The loaded shared object.

    Attributes:
        shared: its functions.
        paths: instruction sets that this processor has, the fastest first.
        bfloat16_products: whether it has the instruction for sums of products of bfloat16 numbers.
        shares_threads: whether it works with torch's threads, not with threads of its own.
    """

    shared: ctypes.CDLL
    paths: tuple[str, ...]
    bfloat16_products: bool
    shares_threads: bool = False

    @property
    def name(self) -> str:
        """What runs: the fastest path, and whether bfloat16 has its own instruction."""
        return f"{self.paths[0]}, bfloat16 products" if self.bfloat16_products else self.paths[0]


@cache
def load_library(folder: Path = _FOLDER) -> Library | None:
    """Return the library in `folder`, or None where it was not built or the system does not load it."""
    files = (folder / f"_core{suffix}" for suffix in EXTENSION_SUFFIXES)
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        return None
    try:
        shared = ctypes.CDLL(str(found))
    except OSError:
        return None
    shared.optgptq_round_group.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    shared.optgptq_round_panel.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    shared.optgptq_sweep_rows.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    shared.optgptq_refine_rows.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    shared.optgptq_binary_search.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    shared.optgptq_binary_group.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    shared.optgptq_binary_sweep.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    shared.optgptq_binary_nearest.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    factors = (pointer, integer, integer) * 2
    shared.optgptq_add_bfloat16_products.argtypes = [*factors, integer, pointer, *(integer,) * 3]
    shared.optgptq_paged_attention.argtypes = [pointer, ctypes.c_int, integer]
    shared.optgptq_causal_attention.argtypes = [pointer, integer, integer]
    shared.optgptq_rotate_bfloat16.argtypes = [pointer, integer]
    shared.optgptq_store_tokens.argtypes = [pointer, ctypes.c_int, integer]
    shared.optgptq_sum_and_norm.argtypes = [pointer, ctypes.c_int, integer]
    shared.optgptq_gated.argtypes = [pointer, ctypes.c_int, integer]
    shared.optgptq_attend_joint.argtypes = [pointer, ctypes.c_int, integer]
    shared.optgptq_greatest.argtypes = [pointer, pointer, integer, integer, ctypes.c_int, integer]
    shared.optgptq_draw.argtypes = [pointer, pointer, ctypes.c_int, integer]
    shared.optgptq_attend_codes.argtypes = [pointer, ctypes.c_int, integer]
    shared.optgptq_store_codes.argtypes = [pointer, ctypes.c_int, integer]
    shared.optgptq_product_supported.argtypes = [ctypes.c_int]
    shared.optgptq_affine_product.argtypes = [pointer, ctypes.c_int, integer]
    shared.optgptq_binary_product.argtypes = [pointer, ctypes.c_int, integer]
    shared.optgptq_dense_tile_numbers.argtypes = [integer, integer]
    shared.optgptq_dense_tile_numbers.restype = integer
    shared.optgptq_pack_dense.argtypes = [pointer, pointer, integer]
    shared.optgptq_multiply_dense.argtypes = [pointer, integer, integer]
    shared.optgptq_attention_function.argtypes = [pointer, pointer, integer, ctypes.c_int, ctypes.c_int]
    shared.optgptq_use_team.argtypes = [pointer]
    shared.optgptq_try_threads.argtypes = [pointer, *(integer,) * 3]
    shared.optgptq_try_threads.restype = integer
    return Library(
        shared=shared,
        paths=tuple(name for name, number in PATHS.items() if shared.optgptq_supported(number)),
        bfloat16_products=bool(shared.optgptq_has_bfloat16_products()),
        shares_threads=bool(shared.optgptq_use_team(torch_team())),
    )


def native_name() -> str:
    """Return what runs the inner loops on a processor, for records and reports; `torch` where nothing was built."""
    library = load_library()
    return "torch" if library is None else library.name


def check_done(status: int) -> None:
    """Raise MemoryError where the library ran out of memory; that is all that can go wrong in it."""
    if status == _NO_MEMORY:
        raise MemoryError("the native inner loops got no work space")
    assert status == 0, f"the native library returned {status}"
