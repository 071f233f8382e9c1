"""Phi-3: Llama with query, key, value and gate, up stored as one linear each, partial rotation and longrope."""

from __future__ import annotations

from optgptq.models.activations import ACTIVATIONS
from optgptq.models.config_reader import ConfigReader
from optgptq.models.families.common import heads, single_linear_stages, with_key_value_heads
from optgptq.models.family import ModelFamily
from optgptq.models.rope_config import read_rope
from optgptq.models.spec import DecoderSpec, LayerSpec, NormSpec, TensorNames

_NAMES = TensorNames(
    embedding="model.embed_tokens",
    layer="model.layers.{index}",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    ignored=(".rotary_emb.inv_freq",),
)


def _phi3_spec(config: ConfigReader) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = config.optional_integer("head_dim") or heads(config, hidden_size=hidden_size, num_heads=num_heads)
    max_position = config.integer("max_position_embeddings", default=4096)
    rope = read_rope(
        config,
        head_dim=head_dim,
        max_position=max_position,
        partial_keys=("partial_rotary_factor",),
        default_original=4096,
    )
    if rope.kind not in ("default", "longrope"):
        raise config.refusal("rope_scaling", rope.kind, expected="default or longrope")
    layer = LayerSpec(
        attention_scale=head_dim**-0.5, sliding_window=config.optional_integer("sliding_window"), rope=rope
    )
    spec = DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm=NormSpec(kind="rms", eps=config.number("rms_norm_eps", default=1e-5)),
        stages=single_linear_stages(
            qkv="self_attn.qkv_proj", o="self_attn.o_proj", up="mlp.gate_up_proj", down="mlp.down_proj"
        ),
        names=_NAMES,
        activation=config.choice("hidden_act", allowed=tuple(ACTIVATIONS), default="silu"),
        gated=True,
        qkv_layout="concatenated",
        max_position=max_position,
        embedding_size=hidden_size,
        tied_head=config.flag("tie_word_embeddings", default=False),
    )
    config.require("attention_bias", False)
    config.finish()
    return spec


PHI3 = ModelFamily(
    name="phi3", architectures=("Phi3ForCausalLM",), build_spec=_phi3_spec, with_kv_heads=with_key_value_heads
)
