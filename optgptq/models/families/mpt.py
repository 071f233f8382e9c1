"""MPT: ALiBi, no biases at all, optionally clipped queries, keys and values.

Models whose query heads share keys and values are written as the original code (llm-foundry) writes them, with
`attn_type: grouped_query_attention` and `kv_n_heads`. transformers has no such MPT and refuses the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optgptq.models.config_reader import ConfigReader
from optgptq.models.families.alibi_slopes import mpt_slopes
from optgptq.models.families.common import heads, single_linear_stages
from optgptq.models.family import ModelFamily
from optgptq.models.spec import AlibiSpec, DecoderSpec, LayerSpec, NormSpec, TensorNames

_NAMES = TensorNames(
    embedding="transformer.wte",
    layer="transformer.blocks.{index}",
    final_norm="transformer.norm_f",
    attention_norm="norm_1",
    mlp_norm="norm_2",
)
_GROUPED = "grouped_query_attention"


def _mpt_spec(config: ConfigReader) -> DecoderSpec:
    hidden_size = config.integer("d_model", "hidden_size")
    num_heads = config.integer("n_heads", "num_attention_heads")
    head_dim = heads(config, hidden_size=hidden_size, num_heads=num_heads)
    attention = config.section("attn_config") or ConfigReader({})
    for reader, key, *allowed in (
        (config, "no_bias", True),
        (config, "expansion_ratio", 4),
        (config, "logit_scale", None),
        (attention, "attn_type", "multihead_attention", _GROUPED),
        (attention, "alibi", True),
        # transformers uses 8 whatever is written here, the original code what is written.
        (attention, "alibi_bias_max", 8),
        (attention, "prefix_lm", False),
        (attention, "qk_ln", False),
        (attention, "attn_uses_sequence_id", False),
    ):
        reader.require(key, *allowed)
    config.require("norm_type", "low_precision_layernorm", "layernorm")
    # Used by the original code only where there is no ALiBi.
    config.raw("learned_pos_emb")
    scale = attention.number("softmax_scale", default=head_dim**-0.5)
    num_layers = config.integer("n_layers", "num_hidden_layers")
    spec = DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(attention, num_heads),
        head_dim=head_dim,
        layers=(LayerSpec(attention_scale=scale),) * num_layers,
        norm=NormSpec(kind="layer", eps=config.number("layer_norm_epsilon", default=1e-5)),
        stages=single_linear_stages(qkv="attn.Wqkv", o="attn.out_proj", up="ffn.up_proj", down="ffn.down_proj"),
        names=_NAMES,
        activation="gelu",
        gated=False,
        qkv_layout="concatenated",
        max_position=config.integer("max_seq_len", default=2048),
        embedding_size=hidden_size,
        alibi=AlibiSpec(slopes=mpt_slopes(num_heads)),
        # Zero means no clipping to the original code.
        clip_qkv=attention.optional_number("clip_qkv") or None,
        tied_head=config.flag("tie_word_embeddings", default=True),
    )
    attention.finish("attn_impl")
    config.finish("init_config")
    return spec


def _num_kv_heads(attention: ConfigReader, num_heads: int) -> int:
    if attention.raw("attn_type") != _GROUPED:
        attention.require("kv_n_heads", num_heads)
        return num_heads
    num_kv_heads = attention.integer("kv_n_heads")
    if num_heads % num_kv_heads:
        raise attention.refusal("kv_n_heads", num_kv_heads, expected=f"a divisor of {num_heads} query heads")
    return num_kv_heads


def _with_kv_heads(config: Mapping[str, Any], num_kv_heads: int) -> dict[str, Any]:
    attention = {**(config.get("attn_config") or {}), "attn_type": _GROUPED, "kv_n_heads": num_kv_heads}
    return {**config, "attn_config": attention}


MPT = ModelFamily(
    name="mpt",
    architectures=("MptForCausalLM", "MPTForCausalLM"),
    build_spec=_mpt_spec,
    with_kv_heads=_with_kv_heads,
)
