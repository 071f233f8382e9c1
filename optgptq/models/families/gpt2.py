"""GPT-2: learned positions, fused query-key-value, weights stored transposed (Conv1D)."""

from __future__ import annotations

from optgptq.models.activations import ACTIVATIONS
from optgptq.models.config_reader import ConfigReader
from optgptq.models.families.common import ALL_BIASED, heads, single_linear_stages
from optgptq.models.family import ModelFamily
from optgptq.models.spec import DecoderSpec, LayerSpec, NormSpec, TensorNames

_NAMES = TensorNames(
    embedding="transformer.wte",
    position_embedding="transformer.wpe",
    layer="transformer.h.{index}",
    final_norm="transformer.ln_f",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    ignored=(".attn.bias", ".attn.masked_bias"),
)


def _gpt2_spec(config: ConfigReader) -> DecoderSpec:
    hidden_size = config.integer("n_embd", "hidden_size")
    num_heads = config.integer("n_head", "num_attention_heads")
    head_dim = heads(config, hidden_size=hidden_size, num_heads=num_heads)
    scale = head_dim**-0.5 if config.flag("scale_attn_weights", default=True) else 1.0
    by_layer = config.flag("scale_attn_by_inverse_layer_idx", default=False)
    num_layers = config.integer("n_layer", "num_hidden_layers")
    max_position = config.integer("n_positions", "max_position_embeddings", default=1024)
    config.require("add_cross_attention", False)
    # Order and precision of the same products: nothing else in float32.
    config.raw("reorder_and_upcast_attn")
    spec = DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("n_inner", default=4 * hidden_size),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        layers=tuple(
            LayerSpec(attention_scale=scale / (index + 1) if by_layer else scale) for index in range(num_layers)
        ),
        norm=NormSpec(kind="layer", eps=config.number("layer_norm_epsilon", default=1e-5), has_bias=True),
        stages=single_linear_stages(qkv="attn.c_attn", o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
        names=_NAMES,
        activation=config.choice("activation_function", allowed=tuple(ACTIVATIONS), default="gelu_new"),
        gated=False,
        qkv_layout="concatenated",
        biased_stages=ALL_BIASED,
        max_position=max_position,
        num_learned_positions=max_position,
        embedding_size=hidden_size,
        tied_head=config.flag("tie_word_embeddings", default=True),
        stored_transposed=True,
    )
    config.finish()
    return spec


GPT2 = ModelFamily(
    name="gpt2", architectures=("GPT2LMHeadModel",), build_spec=_gpt2_spec, optional_prefix="transformer."
)
