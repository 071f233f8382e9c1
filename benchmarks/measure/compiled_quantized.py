"""Cases of the kernels of a quantized KV cache, with the sizes and options that they are started with."""

from __future__ import annotations

from typing import Any

from measure.compiled import TARGETS, CompiledCase
from measure.compiled_attention import INSTRUCTIONS, KINDS, PLAIN, POINTERS, device_kind_of
from optgptq.kernels.triton_attention import SEGMENT, padded_head_dim
from optgptq.kernels.triton_quantized_attention import choose_tiles, code_side, launch_options, page_shape
from optgptq.kernels.triton_quantized_source import quantized_attention_of_rows
from optgptq.kernels.triton_store_codes import (
    FITTED_OPTIONS,
    FITTED_TOGETHER,
    ROUNDED_OPTIONS,
    ROUNDED_TOGETHER,
    group_warps,
    num_parts,
)
from optgptq.kernels.triton_store_codes_source import store_groups_of_side, store_tokens_of_side
from optgptq.kv_cache.fitting import NUM_REFITS
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.scheme import LayerScheme, SideScheme

PAGE, KV_HEADS = 16, 8
EXACT_PAGES = ("exact_keys", "exact_values", "exact_table")


def cases() -> list[CompiledCase]:
    """Return what is compiled for the table."""
    decode, chunk = {"most_rows": 16}, {"most_rows": 2048}
    return [
        attention_case("bf16", 128, "4", "split", **decode),
        attention_case("fp16", 128, "4", "split", **decode),
        attention_case("bf16", 128, "8", "split", **decode),
        attention_case("bf16", 128, "3", "split", **decode),
        attention_case("bf16", 128, "2", "split", **decode),
        attention_case("bf16", 128, "4/64", "split", **decode),
        attention_case("bf16", 128, "2t/4", "split", **decode),
        attention_case("bf16", 128, "4", "all", **decode),
        attention_case("bf16", 128, "4", "all", **chunk),
        attention_case("bf16", 128, "16/4", "all", **chunk),
        attention_case("fp16", 64, "4", "all", **chunk),
        attention_case("fp16", 80, "4", "all", **chunk),
        attention_case("bf16", 96, "3", "all", **chunk),
        attention_case("bf16", 256, "4", "split", **decode),
        attention_case("bf16", 256, "4", "all", **chunk),
        attention_case("fp32", 64, "8", "all", **chunk),
        attention_case(
            "bf16", 128, "4", "all", rule={"window": "i32", "softcap": "fp32"}, label="window, cap", **chunk
        ),
        attention_case("bf16", 128, "4", "split", rule={"slopes": "*fp32"}, label="ALiBi", **decode),
        attention_case("bf16", 128, "4", "split", exact=True, label="exact pages", **decode),
        attention_case("bf16", 128, "4", "all", exact=True, label="exact pages", **chunk),
        store_case("bf16", 128, "4"),
        store_case("bf16", 128, "3/64"),
        store_case("bf16", 128, "4", is_searched=True),
        store_case("bf16", 128, "4", is_fitted=True),
        store_case("bf16", 128, "2/64", is_fitted=True),
        store_case("bf16", 128, "16/4"),
        groups_case("bf16", 128, "2t/4"),
    ]


def layer_scheme(text: str, head_dim: int) -> LayerScheme:
    """Return the scheme of a name: bits of keys and values, "4/64" with groups of 64, "2t" with groups of tokens."""
    bits, _, rest = text.partition("/")
    if rest == "64":
        side = SideScheme(bits=int(bits), group_size=64)
        return LayerScheme(keys=side, values=side)
    sides = [
        SideScheme(bits=int(part.rstrip("t")), group_size=PAGE, axis="token")
        if part.endswith("t")
        else SideScheme(bits=int(part), group_size=head_dim)
        for part in (bits, rest or bits)
    ]
    return LayerScheme(keys=sides[0], values=sides[1])


def page_layout(scheme: str, head_dim: int, exact_bytes: int) -> PageLayout:
    """Return a page of 8 key/value heads."""
    wanted = layer_scheme(scheme, head_dim)
    return PageLayout(num_kv_heads=KV_HEADS, head_dim=head_dim, page_size=PAGE, scheme=wanted, exact_bytes=exact_bytes)


def attention_case(
    kind: str,
    head_dim: int,
    scheme: str,
    mode: str,
    *,
    most_rows: int,
    rule: dict[str, Any] | None = None,
    exact: bool = False,
    label: str = "",
) -> CompiledCase:
    """Return one case of `quantized_attention_of_rows`: 32 query heads and 8 key/value heads.

    Not for gfx1100 with heads of more than 64 features: there registers are kept in memory.
    """
    wanted, dtype = rule or {}, KINDS[kind]
    layout = page_layout(scheme, head_dim, dtype.itemsize)
    tiles = {name: choose_tiles(device_kind_of(name), dtype, layout, most_rows=most_rows) for name in TARGETS}
    constants = {name: value for name, value in PLAIN.items() if name not in wanted or name == "ROUND_ALIBI"}
    constants |= {"NUM_HEADS": 32, "BLOCK_D": padded_head_dim(head_dim), "SEGMENT": SEGMENT, "MODE": mode}
    constants |= {"SHAPE": page_shape(layout), "KEYS": code_side(layout, "keys"), "VALUES": code_side(layout, "values")}
    constants |= {} if mode == "split" else {"states": None}
    constants |= {} if exact else dict.fromkeys(EXACT_PAGES)
    constants |= {} if "16" in scheme else {"raw": None}
    of_kind = dict.fromkeys(("query", "own_key", "own_value", "raw", "exact_keys", "exact_values"), f"*{kind}")
    of_kind |= {"output": "*fp32" if mode == "split" else f"*{kind}", "exact_table": "*i32"}
    rows = "16" if most_rows <= 16 else "many"
    parts = (f"cache attention {mode} {kind} D={head_dim} rows={rows} bits={scheme}", label)
    return CompiledCase(
        name=" ".join(part for part in parts if part),
        kernel=quantized_attention_of_rows,
        signature=POINTERS | of_kind | {"pages": "*i32", "first_exact_of": "*i32"},
        constants=constants,
        constants_of={name: {"TILE": each.keys, "BLOCK_M": each.rows} for name, each in tiles.items()},
        options={
            name: launch_options(device_kind_of(name), dtype, layout, tiles=each, mode=mode)
            for name, each in tiles.items()
            if head_dim <= 64 or name != "gfx1100"
        },
        instruction={} if kind == "fp32" else INSTRUCTIONS,
        multiples=("query_stride", "key_stride", "value_stride"),
    )


def store_case(
    kind: str, head_dim: int, scheme: str, *, is_searched: bool = False, is_fitted: bool = False
) -> CompiledCase:
    """Return one case of `store_tokens_of_side`, for keys; fitted codes choose among ranges too."""
    side = code_side(page_layout(scheme, head_dim, KINDS[kind].itemsize), "keys")
    constants = store_constants(kind, head_dim, scheme) | {"SEARCHED": is_searched or is_fitted}
    constants |= {"BLOCK_T": FITTED_TOGETHER if is_fitted else ROUNDED_TOGETHER, "REFITS": NUM_REFITS}
    constants |= {} if is_fitted else {"metrics": None, "feedbacks": None}
    constants |= {} if side.bits else {"ranges": None}
    label = " fitted" if is_fitted else " searched" if is_searched else ""
    pointers = dict.fromkeys(("ranges", "metrics", "feedbacks"), "*fp32") | {"pages": "*u8", "words": "*i32"}
    return CompiledCase(
        name=f"store codes {kind} D={head_dim} bits={scheme}{label}",
        kernel=store_tokens_of_side,
        signature=POINTERS | pointers | {"x": f"*{kind}", "raw": f"*{kind}"},
        constants=constants,
        options=dict.fromkeys(TARGETS, FITTED_OPTIONS if is_fitted else ROUNDED_OPTIONS),
        multiples=("token_stride",),
    )


def groups_case(kind: str, head_dim: int, scheme: str) -> CompiledCase:
    """Return one case of `store_groups_of_side`, for keys."""
    pointers = {"pages": "*u8", "words": "*i32", "ranges": "*fp32", "exact_table": "*i32"}
    return CompiledCase(
        name=f"store groups of tokens {kind} D={head_dim} bits={scheme}",
        kernel=store_groups_of_side,
        signature=POINTERS | pointers | {"x": f"*{kind}", "exact_pages": f"*{kind}"},
        constants=store_constants(kind, head_dim, scheme) | {"BLOCK_T": PAGE, "SEARCHED": False, "TRANSPOSED": True},
        options=dict.fromkeys(TARGETS, ROUNDED_OPTIONS | {"num_warps": group_warps(PAGE * padded_head_dim(head_dim))}),
        multiples=("token_stride",),
    )


def store_constants(kind: str, head_dim: int, scheme: str) -> dict[str, Any]:
    """Return what both kernels that store keys are told."""
    layout = page_layout(scheme, head_dim, KINDS[kind].itemsize)
    side = code_side(layout, "keys")
    sizes = {"PARTS": num_parts(side), "BLOCK_D": padded_head_dim(head_dim)}
    return {"SHAPE": page_shape(layout), "SIDE": side, **sizes}
