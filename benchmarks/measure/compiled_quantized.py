"""Cases of the kernels of a quantized KV cache, with the sizes and options that they are started with."""

from __future__ import annotations

from typing import Any

from measure.compiled import TARGETS, CompiledCase
from measure.compiled_attention import INSTRUCTIONS, KINDS, PLAIN, POINTERS, device_kind_of
from optgptq.kernels.triton_attention import SEGMENT, padded_head_dim
from optgptq.kernels.triton_quantized_attention import choose_tiles, code_side, page_shape
from optgptq.kernels.triton_quantized_source import quantized_attention_of_rows
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
        attention_case("bf16", 128, "4", "all", rule={"window": "i32", "softcap": "fp32"}, label="window, cap", **chunk),
        attention_case("bf16", 128, "4", "split", rule={"slopes": "*fp32"}, label="ALiBi", **decode),
        attention_case("bf16", 128, "4", "split", exact=True, label="exact pages", **decode),
        attention_case("bf16", 128, "4", "all", exact=True, label="exact pages", **chunk),
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
    """Return one case of `quantized_attention_of_rows`: 32 query heads and 8 key/value heads."""
    wanted, dtype = rule or {}, KINDS[kind]
    layout = PageLayout(
        num_kv_heads=KV_HEADS,
        head_dim=head_dim,
        page_size=PAGE,
        scheme=layer_scheme(scheme, head_dim),
        exact_bytes=dtype.itemsize,
    )
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
        options={name: each.options for name, each in tiles.items()},
        instruction={} if kind == "fp32" else INSTRUCTIONS,
        multiples=("query_stride", "key_stride", "value_stride"),
    )
