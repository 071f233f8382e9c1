"""Subjects for target checks: linears of a Llama of any size, and changes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optgptq.layout import LinearLayout
from optgptq.targets import TargetSubject
from optgptq.targets.records import Splits

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a Llama; those of Llama-2-7B."""

    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    kv_heads: int = 32
    layers: int = 2


def llama_layouts(
    sizes: Sizes, *, bits: int | None = 4, group_size: int = 128, symmetric: bool = True, coefficients: Any = None
) -> tuple[LinearLayout, ...]:
    """Return the linears of every decoder layer with the same settings, and a dense head."""
    head_dim = sizes.hidden // sizes.heads
    shapes = {
        ATTENTION[0]: (sizes.hidden, sizes.hidden),
        ATTENTION[1]: (sizes.kv_heads * head_dim, sizes.hidden),
        ATTENTION[2]: (sizes.kv_heads * head_dim, sizes.hidden),
        "self_attn.o_proj": (sizes.hidden, sizes.hidden),
        FEED_FORWARD[0]: (sizes.intermediate, sizes.hidden),
        FEED_FORWARD[1]: (sizes.intermediate, sizes.hidden),
        "mlp.down_proj": (sizes.hidden, sizes.intermediate),
    }
    layouts = []
    for index in range(sizes.layers):
        prefix = f"model.layers.{index}"
        for leaf, (rows, columns) in shapes.items():
            group = next((group for group in (ATTENTION, FEED_FORWARD) if leaf in group), (leaf,))
            fused = {ATTENTION: "self_attn.qkv_proj", FEED_FORWARD: "mlp.gate_up_proj"}.get(group, leaf)
            layouts.append(
                LinearLayout(
                    name=f"{prefix}.{leaf}",
                    out_features=rows,
                    in_features=columns,
                    bits=bits,
                    group_size=group_size,
                    symmetric=symmetric,
                    coefficients=coefficients,
                    fused_names=tuple(f"{prefix}.{member}" for member in group),
                    fused_name=f"{prefix}.{fused}",
                )
            )
    head = LinearLayout(name="lm_head", out_features=32000, in_features=sizes.hidden, bits=None)
    return (*layouts, head)


def subject(
    form: str = "gptq",
    *,
    sizes: Sizes | None = None,
    layouts: tuple[LinearLayout, ...] | None = None,
    facts: dict[str, Any] | None = None,
    **settings: Any,
) -> TargetSubject:
    """Return a Llama in format `form`; `settings` go to its layouts, `facts` to the subject."""
    sizes = sizes or Sizes()
    layouts = layouts or llama_layouts(sizes, **settings)
    splits: dict[str, Splits] = {
        layout.name: "columns" if layout.name.endswith(("o_proj", "down_proj")) else "rows" for layout in layouts
    }
    values: dict[str, Any] = {
        "format": form,
        "layouts": layouts,
        "model_type": "llama",
        "model_dtype": "bfloat16",
        "num_heads": sizes.heads,
        "num_kv_heads": sizes.kv_heads,
        "head_dim": sizes.hidden // sizes.heads,
        "splits": splits,
    }
    return TargetSubject(**{**values, **(facts or {})})
