"""Falcon: three layouts of the fused query-key-value, one or two norms, ALiBi or rotary.

Query heads that share keys and values are the new decoder architecture. Beside a sequential residual (`parallel_attn:
false`, as in Falcon-RW) transformers cannot run it: its layer ends with an error. Models of that kind come from
grouping the heads of a Falcon-RW and are read here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optgptq.models.activations import ACTIVATIONS
from optgptq.models.config_reader import ConfigReader
from optgptq.models.families.alibi_slopes import interpolated_slopes
from optgptq.models.families.common import ALL_BIASED, heads, single_linear_stages
from optgptq.models.family import ModelFamily
from optgptq.models.rope_config import read_rope
from optgptq.models.spec import AlibiSpec, DecoderSpec, LayerSpec, NormSpec, QKVLayout, Residual, TensorNames

_NAMES = TensorNames(
    embedding="transformer.word_embeddings",
    layer="transformer.h.{index}",
    final_norm="transformer.ln_f",
    attention_norm="input_layernorm",
    mlp_norm=None,
    ignored=(".rotary_emb.inv_freq",),
)


def _falcon_spec(config: ConfigReader) -> DecoderSpec:
    hidden_size = config.integer("n_embed", "hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = heads(config, hidden_size=hidden_size, num_heads=num_heads)
    grouped = config.flag("new_decoder_architecture", default=False)
    qkv_layout, num_kv_heads = _qkv(config, grouped=grouped, num_heads=num_heads)
    residual, names = _norms(config, grouped=grouped)
    alibi = config.flag("alibi", default=False)
    max_position = config.integer("max_position_embeddings", default=2048)
    rope = read_rope(config, head_dim=head_dim, max_position=max_position)
    layer = LayerSpec(attention_scale=head_dim**-0.5, rope=None if alibi else rope)
    # The bias is scaled together with the scores.
    bias = AlibiSpec(slopes=interpolated_slopes(num_heads), scale=head_dim**-0.5, bfloat16_bias=True)
    spec = DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("ffn_hidden_size", default=4 * hidden_size),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm=NormSpec(kind="layer", eps=config.number("layer_norm_epsilon", default=1e-5), has_bias=True),
        stages=single_linear_stages(
            qkv="self_attention.query_key_value",
            o="self_attention.dense",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
        ),
        names=names,
        activation=config.choice("activation", allowed=tuple(ACTIVATIONS), default="gelu"),
        gated=False,
        qkv_layout=qkv_layout,
        residual=residual,
        biased_stages=ALL_BIASED if config.flag("bias", default=False) else (),
        max_position=None if alibi else max_position,
        embedding_size=hidden_size,
        alibi=bias if alibi else None,
        tied_head=config.flag("tie_word_embeddings", default=True),
    )
    config.finish()
    return spec


def _qkv(config: ConfigReader, *, grouped: bool, num_heads: int) -> tuple[QKVLayout, int]:
    """Return layout and number of key/value heads. `multi_query` and `num_kv_heads` do not count everywhere."""
    multi_query = config.flag("multi_query", default=True)
    num_kv_heads = config.integer("num_kv_heads", default=num_heads)
    if grouped:
        if num_heads % num_kv_heads:
            raise config.refusal("num_kv_heads", num_kv_heads, expected=f"a divisor of {num_heads} query heads")
        return "grouped_interleaved", num_kv_heads
    if multi_query:
        return "concatenated", 1
    if num_kv_heads != num_heads:
        raise config.refusal("num_kv_heads", num_kv_heads, expected=f"{num_heads}, the number of query heads")
    return "per_head_interleaved", num_heads


def _norms(config: ConfigReader, *, grouped: bool) -> tuple[Residual, TensorNames]:
    parallel = config.flag("parallel_attn", default=True)
    num_norms = config.integer("num_ln_in_parallel_attn", default=2 if grouped else 1)
    if grouped and not parallel and num_norms != 1:
        expected = "true with new_decoder_architecture, unless num_ln_in_parallel_attn is 1"
        raise config.refusal("parallel_attn", parallel, expected=expected)
    if not parallel:
        return "sequential", replace(_NAMES, mlp_norm="post_attention_layernorm")
    if num_norms > (2 if grouped else 1):
        raise config.refusal("num_ln_in_parallel_attn", num_norms, expected="2 or 1 (new decoder), 1 (old decoder)")
    if num_norms == 2:
        return "parallel", replace(_NAMES, attention_norm="ln_attn", mlp_norm="ln_mlp")
    return "parallel_shared_norm", _NAMES


def _with_kv_heads(config: Mapping[str, Any], num_kv_heads: int) -> dict[str, Any]:
    """Return the config of the new decoder architecture; norms and residual stay what they are."""
    changed = {**config, "new_decoder_architecture": True, "num_kv_heads": num_kv_heads}
    if not config.get("new_decoder_architecture"):
        changed |= {"num_ln_in_parallel_attn": 1, "multi_query": False}
    return changed


FALCON = ModelFamily(
    name="falcon", architectures=("FalconForCausalLM",), build_spec=_falcon_spec, with_kv_heads=_with_kv_heads
)
