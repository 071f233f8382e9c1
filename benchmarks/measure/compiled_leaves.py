"""Cases of the kernels between the products of a layer, with the sizes that they are started with."""

from __future__ import annotations

from typing import Any

from measure.compiled import TARGETS, CompiledCase
from optgptq.kernels.triton_leaves import GATED_COLUMNS, GATED_KINDS, OPTIONS, ROTATED_HEADS, norm_sizes
from optgptq.kernels.triton_leaves_source import gated_rows, norm_rows, rotate_query_and_key


def cases() -> list[CompiledCase]:
    """Return what is compiled for the table."""
    kinds = sorted(set(GATED_KINDS.values()))
    return [
        norm_case("bf16", 4096, residual=True),
        norm_case("fp16", 14336, residual=False),
        norm_case("bf16", 128, residual=False),
        rotation_case("bf16"),
        *(gated_case("bf16", kind) for kind in kinds),
    ]


def norm_case(kind: str, size: int, *, residual: bool) -> CompiledCase:
    """Return the norm of rows, with or without a residual that is added first."""
    block, num_rows, num_warps = norm_sizes(size)
    constants: dict[str, Any] = {"SIZE": size, "BLOCK": block, "ROWS": num_rows}
    pointers = dict.fromkeys(("x", "weight", "output", "residual"), f"*{kind}")
    return CompiledCase(
        name=f"norm {kind} {size}{' with residual' if residual else ''}",
        kernel=norm_rows,
        signature=pointers | {"eps": "fp32"},
        constants=constants if residual else constants | {"residual": None},
        options={target: {"num_warps": num_warps, **OPTIONS} for target in TARGETS},
        multiples=("row_stride",),
    )


def rotation_case(kind: str) -> CompiledCase:
    """Return the rotation of 32 query heads and 8 key heads of 128 features."""
    sizes = {"HEAD_DIM": 128, "HALF": 64, "BLOCK_HALF": 64, "BLOCK_H": ROTATED_HEADS}
    return CompiledCase(
        name=f"rotation {kind}",
        kernel=rotate_query_and_key,
        signature=dict.fromkeys(("query", "key", "cosine", "sine"), f"*{kind}"),
        constants={"NUM_HEADS": 32, "NUM_KV_HEADS": 8, **sizes},
        options={target: {"num_warps": 1, **OPTIONS} for target in TARGETS},
        multiples=("query_token_stride", "key_token_stride"),
    )


def gated_case(kind: str, activation: str) -> CompiledCase:
    """Return a gated activation of 14336 columns."""
    return CompiledCase(
        name=f"gated {activation} {kind}",
        kernel=gated_rows,
        signature=dict.fromkeys(("gate", "up", "output"), f"*{kind}"),
        constants={"SIZE": 14336, "BLOCK": GATED_COLUMNS, "KIND": activation},
        options={target: {"num_warps": 4, **OPTIONS} for target in TARGETS},
        multiples=("gate_stride", "up_stride"),
    )
