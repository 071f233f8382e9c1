"""GPT-NeoX and Pythia: query, key and value interleaved per head, partial rotation, attention beside feed-forward."""

from __future__ import annotations

from optgptq.models.activations import ACTIVATIONS
from optgptq.models.config_reader import ConfigReader
from optgptq.models.families.common import ALL_BIASED, heads, single_linear_stages
from optgptq.models.family import ModelFamily
from optgptq.models.rope_config import read_rope
from optgptq.models.spec import DecoderSpec, LayerSpec, NormSpec, TensorNames

_NAMES = TensorNames(
    embedding="gpt_neox.embed_in",
    layer="gpt_neox.layers.{index}",
    final_norm="gpt_neox.final_layer_norm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)


def _gpt_neox_spec(config: ConfigReader) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = heads(config, hidden_size=hidden_size, num_heads=num_heads)
    max_position = config.integer("max_position_embeddings", default=2048)
    rope = read_rope(
        config,
        head_dim=head_dim,
        max_position=max_position,
        partial_keys=("rotary_pct",),
        default_partial=0.25,
        theta_keys=("rotary_emb_base",),
    )
    spec = DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        layers=(LayerSpec(attention_scale=head_dim**-0.5, rope=rope),) * config.integer("num_hidden_layers"),
        norm=NormSpec(kind="layer", eps=config.number("layer_norm_eps", default=1e-5), has_bias=True),
        stages=single_linear_stages(
            qkv="attention.query_key_value", o="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"
        ),
        names=_NAMES,
        activation=config.choice("hidden_act", allowed=tuple(ACTIVATIONS), default="gelu"),
        gated=False,
        qkv_layout="per_head_interleaved",
        residual="parallel" if config.flag("use_parallel_residual", default=True) else "sequential",
        biased_stages=ALL_BIASED if config.flag("attention_bias", default=True) else ("gate_up", "down"),
        max_position=max_position,
        embedding_size=hidden_size,
        tied_head=config.flag("tie_word_embeddings", default=False),
    )
    config.finish()
    return spec


GPT_NEOX = ModelFamily(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    build_spec=_gpt_neox_spec,
    other_head="embed_out",
)
