"""Cases of the attention kernels over pages, with the sizes and options that they are started with."""

from __future__ import annotations

from typing import Any

import torch

from measure.compiled import TARGETS, CompiledCase
from optgptq.kernels.device_kind import DeviceKind
from optgptq.kernels.triton_attention import (
    JOINED_TOGETHER,
    SEGMENT,
    STORED_TOGETHER,
    choose_tiles,
    padded_head_dim,
)
from optgptq.kernels.triton_attention_source import attention_of_rows, join_segments
from optgptq.kernels.triton_leaves_source import store_rows

KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PAGE = 16
POINTERS = {
    "query_start": "*i32",
    "context_lengths": "*i32",
    "page_table": "*i32",
    "slopes": "*fp32",
    "sinks": "*fp32",
    "states": "*fp32",
    "slots": "*i64",
    "scale": "fp32",
    "softcap": "fp32",
    "alibi_scale": "fp32",
}
PLAIN = {"slopes": None, "sinks": None, "window": None, "softcap": None, "ROUND_ALIBI": False}
# Products of 16-bit numbers; sm_90 has 64 rows of its own kind, which these kernels never ask for.
INSTRUCTIONS = {
    "sm_80": r"mma\.sync\.aligned\.m16n8k16",
    "sm_90": r"mma\.sync\.aligned\.m16n8k16",
    "gfx90a": r"v_mfma_f32_16x16x16",
    "gfx942": r"v_mfma_f32_16x16x16",
    "gfx1100": r"v_wmma_f32_16x16x16",
}


def cases() -> list[CompiledCase]:
    """Return what is compiled for the table."""
    decode, chunk = {"most_rows": 16}, {"most_rows": 2048}
    attention = [
        attention_case("fp16", 128, "split", **decode),
        attention_case("bf16", 128, "split", **decode),
        attention_case("bf16", 128, "all", **decode),
        attention_case("bf16", 128, "all", **chunk),
        attention_case("fp16", 64, "split", **decode),
        attention_case("fp16", 64, "all", **chunk),
        attention_case("fp16", 80, "all", **chunk),
        attention_case("bf16", 256, "split", **decode),
        attention_case("bf16", 256, "all", **chunk),
        attention_case("bf16", 96, "all", **chunk),
        attention_case("bf16", 32, "all", **chunk),
        attention_case("fp32", 64, "all", **chunk),
        attention_case("bf16", 128, "all", rule={"window": "i32", "softcap": "fp32"}, label="window, cap", **chunk),
        attention_case("bf16", 128, "split", rule={"slopes": "*fp32"}, label="ALiBi", **decode),
        attention_case(
            "bf16", 64, "all", rule={"slopes": "*fp32", "ROUND_ALIBI": True}, label="rounded ALiBi", **chunk
        ),
        attention_case("bf16", 64, "one", rule={"sinks": "*fp32", "window": "i32"}, label="sinks, window", **decode),
    ]
    return [*attention, _join_case("bf16", 128), _store_case("bf16", 128)]


def attention_case(
    kind: str,
    head_dim: int,
    mode: str,
    *,
    most_rows: int,
    rule: dict[str, Any] | None = None,
    label: str = "",
    page_size: int = PAGE,
) -> CompiledCase:
    """Return one case of `attention_of_rows`: 32 query heads and 8 key/value heads."""
    wanted = rule or {}
    tiles = {name: choose_tiles(device_kind_of(name), KINDS[kind], head_dim, most_rows=most_rows) for name in TARGETS}
    constants = {name: value for name, value in PLAIN.items() if name not in wanted or name == "ROUND_ALIBI"}
    constants |= {name: value for name, value in wanted.items() if name == "ROUND_ALIBI"}
    constants |= {"NUM_HEADS": 32, "GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
    constants |= {"PAGE": page_size, "SEGMENT": SEGMENT, "MODE": mode}
    constants |= {} if mode == "split" else {"states": None}
    of_kind = dict.fromkeys(("query", "keys", "values", "output"), f"*{kind}")
    of_kind |= {"output": "*fp32"} if mode == "split" else {}
    parts = (f"attention {mode} {kind} D={head_dim} rows={'16' if most_rows <= 16 else 'many'}", label)
    return CompiledCase(
        name=" ".join(part for part in parts if part),
        kernel=attention_of_rows,
        signature=POINTERS | of_kind,
        constants=constants,
        constants_of={name: {"TILE": each.keys, "BLOCK_M": each.rows} for name, each in tiles.items()},
        options={name: each.options for name, each in tiles.items()},
        instruction={} if kind == "fp32" else INSTRUCTIONS,
        multiples=("query_token_stride",),
    )


def device_kind_of(target: str) -> DeviceKind:
    device = TARGETS[target].device
    return DeviceKind(is_hip=device.backend == "hip", wave_size=device.warp_size)


def _join_case(kind: str, head_dim: int) -> CompiledCase:
    constants = {"slopes": None, "sinks": None, "window": None, "ROUND_ALIBI": False, "NUM_HEADS": 32}
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
    return CompiledCase(
        name=f"join segments {kind} D={head_dim}",
        kernel=join_segments,
        signature=POINTERS | {"sums": "*fp32", "output": f"*{kind}"},
        constants=constants | {"SEGMENT": SEGMENT, "TOGETHER": JOINED_TOGETHER},
        options={target: {"num_warps": 1, "enable_fp_fusion": False} for target in TARGETS},
    )


def _store_case(kind: str, head_dim: int) -> CompiledCase:
    constants = {"NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "PAGE": PAGE}
    return CompiledCase(
        name=f"store keys and values {kind} D={head_dim}",
        kernel=store_rows,
        signature=POINTERS | dict.fromkeys(("key", "value", "keys", "values"), f"*{kind}"),
        constants=constants | {"BLOCK_T": STORED_TOGETHER},
        options={target: {"num_warps": 4} for target in TARGETS},
        multiples=("key_token_stride", "value_token_stride"),
    )
