"""BLOOM: ALiBi, a norm on the embedding, query, key and value interleaved per head."""

from __future__ import annotations

from optgptq.models.config_reader import ConfigReader
from optgptq.models.families.alibi_slopes import interpolated_slopes
from optgptq.models.families.common import ALL_BIASED, heads, single_linear_stages
from optgptq.models.family import ModelFamily
from optgptq.models.spec import AlibiSpec, DecoderSpec, LayerSpec, NormSpec, TensorNames

_NAMES = TensorNames(
    embedding="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    layer="transformer.h.{index}",
    final_norm="transformer.ln_f",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
)
# Settings of the training code that its configs still carry.
_TRAINING_KEYS = (
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "offset_alibi",
    "slow_but_exact",
    "skip_bias_add",
    "skip_bias_add_qkv",
)


def _bloom_spec(config: ConfigReader) -> DecoderSpec:
    hidden_size = config.integer("n_embed", "hidden_size")
    num_heads = config.integer("n_head", "num_attention_heads")
    head_dim = heads(config, hidden_size=hidden_size, num_heads=num_heads)
    config.require("n_inner", 4 * hidden_size)
    spec = DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        layers=(LayerSpec(attention_scale=head_dim**-0.5),) * config.integer("n_layer", "num_hidden_layers"),
        norm=NormSpec(kind="layer", eps=config.number("layer_norm_epsilon", default=1e-5), has_bias=True),
        stages=single_linear_stages(
            qkv="self_attention.query_key_value",
            o="self_attention.dense",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
        ),
        names=_NAMES,
        activation="gelu_pytorch_tanh",
        gated=False,
        qkv_layout="per_head_interleaved",
        residual_after_norm=config.flag("apply_residual_connection_post_layernorm", default=False),
        biased_stages=ALL_BIASED,
        max_position=None,
        embedding_size=hidden_size,
        alibi=AlibiSpec(slopes=interpolated_slopes(num_heads)),
        tied_head=config.flag("tie_word_embeddings", default=True),
    )
    config.finish(*_TRAINING_KEYS)
    return spec


BLOOM = ModelFamily(
    name="bloom", architectures=("BloomForCausalLM",), build_spec=_bloom_spec, optional_prefix="transformer."
)
