"""What several families share when they read a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optgptq.models.config_reader import ConfigReader
from optgptq.models.spec import Stage, StageName

LLAMA_STAGES = (
    Stage(
        name="qkv",
        linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        fused_name="self_attn.qkv_proj",
    ),
    Stage(name="o", linears=("self_attn.o_proj",)),
    Stage(name="gate_up", linears=("mlp.gate_proj", "mlp.up_proj"), fused_name="mlp.gate_up_proj"),
    Stage(name="down", linears=("mlp.down_proj",)),
)

ALL_BIASED: tuple[StageName, ...] = ("qkv", "o", "gate_up", "down")


def single_linear_stages(*, qkv: str, o: str, up: str, down: str) -> tuple[Stage, ...]:
    """Return stages of one linear each: a fused query-key-value and a plain feed-forward."""
    return (
        Stage(name="qkv", linears=(qkv,)),
        Stage(name="o", linears=(o,)),
        Stage(name="gate_up", linears=(up,)),
        Stage(name="down", linears=(down,)),
    )


def with_key_value_heads(config: Mapping[str, Any], num_kv_heads: int) -> dict[str, Any]:
    """Return the config with another number of key/value heads, as most families write it."""
    return {**config, "num_key_value_heads": num_kv_heads}


def layer_windows(
    config: ConfigReader, num_layers: int, *, window: int | None, default_types: Sequence[str]
) -> tuple[int | None, ...]:
    """Return the sliding window of each layer after the config's `layer_types`."""
    return tuple(
        window if kind == "sliding_attention" else None for kind in layer_types(config, num_layers, default_types)
    )


def layer_types(config: ConfigReader, num_layers: int, default: Sequence[str]) -> tuple[str, ...]:
    """Return `full_attention` or `sliding_attention` for each layer."""
    kinds = config.raw("layer_types") or default
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, (list, tuple)) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
        raise config.refusal("layer_types", kinds, expected=f"a list of {num_layers} of {' or '.join(known)}")
    return tuple(kinds)


def heads(config: ConfigReader, *, hidden_size: int, num_heads: int) -> int:
    """Return the head dimension where the config does not state one. Refuses widths that heads do not divide."""
    if hidden_size % num_heads:
        raise config.refusal("num_attention_heads", num_heads, expected=f"a divisor of the width {hidden_size}")
    return hidden_size // num_heads
