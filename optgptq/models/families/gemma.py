"""Gemma 1, 2 and 3 (text): norms that multiply by one plus their weight, scaled embeddings, soft caps, local layers."""

from __future__ import annotations

from dataclasses import replace

from optgptq.models.config_reader import ConfigReader
from optgptq.models.families.common import LLAMA_STAGES, layer_types, layer_windows, with_key_value_heads
from optgptq.models.family import ModelFamily
from optgptq.models.rope_config import read_rope, read_rope_section
from optgptq.models.spec import DecoderSpec, LayerSpec, NormSpec, RopeSpec, TensorNames

_NAMES = TensorNames(
    embedding="model.embed_tokens",
    layer="model.layers.{index}",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    ignored=(".rotary_emb.inv_freq",),
)
_FOUR_NORMS = replace(
    _NAMES,
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)


def _gemma_shape(
    config: ConfigReader, *, names: TensorNames, layers: tuple[LayerSpec, ...], head_dim: int, max_position: int
) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise config.refusal("num_key_value_heads", num_kv_heads, expected=f"a divisor of {num_heads} query heads")
    config.require("use_bidirectional_attention", False)
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=layers,
        norm=NormSpec(kind="rms", eps=config.number("rms_norm_eps", default=1e-6), weight_offset=1),
        stages=LLAMA_STAGES,
        names=names,
        activation="gelu_pytorch_tanh",
        gated=True,
        biased_stages=("qkv", "o") if config.flag("attention_bias", default=False) else (),
        max_position=max_position,
        embedding_size=hidden_size,
        embedding_scale=hidden_size**0.5,
        tied_head=config.flag("tie_word_embeddings", default=True),
    )


def _gemma_spec(config: ConfigReader) -> DecoderSpec:
    # "gelu" in the first configs always meant the tanh approximation.
    config.choice("hidden_act", allowed=("gelu", "gelu_pytorch_tanh"), default="gelu_pytorch_tanh")
    config.require("hidden_activation", "gelu", "gelu_pytorch_tanh")
    head_dim = config.integer("head_dim", default=256)
    max_position = config.integer("max_position_embeddings", default=8192)
    rope = read_rope(config, head_dim=head_dim, max_position=max_position)
    layers = (LayerSpec(attention_scale=head_dim**-0.5, rope=rope),) * config.integer("num_hidden_layers")
    spec = _gemma_shape(config, names=_NAMES, layers=layers, head_dim=head_dim, max_position=max_position)
    config.finish()
    return spec


def _gemma2_spec(config: ConfigReader) -> DecoderSpec:
    _require_tanh_gelu(config)
    head_dim = config.integer("head_dim", default=256)
    max_position = config.integer("max_position_embeddings", default=8192)
    rope = read_rope(config, head_dim=head_dim, max_position=max_position)
    scale = config.number("query_pre_attn_scalar", default=256) ** -0.5
    num_layers = config.integer("num_hidden_layers")
    alternating = [("sliding_attention", "full_attention")[index % 2] for index in range(num_layers)]
    window = config.optional_integer("sliding_window", absent=4096)
    windows = layer_windows(config, num_layers, window=window, default_types=alternating)
    layers = tuple(LayerSpec(attention_scale=scale, sliding_window=window, rope=rope) for window in windows)
    spec = _gemma_shape(config, names=_FOUR_NORMS, layers=layers, head_dim=head_dim, max_position=max_position)
    spec = replace(
        spec,
        attention_softcap=config.optional_number("attn_logit_softcapping", absent=50.0),
        logit_softcap=config.optional_number("final_logit_softcapping", absent=30.0),
    )
    config.finish()
    return spec


def _gemma3_spec(config: ConfigReader) -> DecoderSpec:
    _require_tanh_gelu(config)
    config.require("attn_logit_softcapping")
    head_dim = config.integer("head_dim", default=256)
    max_position = config.integer("max_position_embeddings", default=131_072)
    ropes = _gemma3_ropes(config, head_dim=head_dim, max_position=max_position)
    scale = config.number("query_pre_attn_scalar", default=256) ** -0.5
    window = config.optional_integer("sliding_window", absent=4096)
    layers = tuple(
        LayerSpec(
            attention_scale=scale,
            sliding_window=window if kind == "sliding_attention" else None,
            rope=ropes[kind],
        )
        for kind in _gemma3_layer_types(config)
    )
    names = replace(_FOUR_NORMS, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
    spec = _gemma_shape(config, names=names, layers=layers, head_dim=head_dim, max_position=max_position)
    spec = replace(spec, logit_softcap=config.optional_number("final_logit_softcapping"))
    config.finish()
    return spec


def _require_tanh_gelu(config: ConfigReader) -> None:
    config.choice("hidden_activation", allowed=("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
    # Written into the same configs, read by nobody.
    config.raw("hidden_act")


def _gemma3_layer_types(config: ConfigReader) -> tuple[str, ...]:
    num_layers = config.integer("num_hidden_layers")
    pattern = config.integer("sliding_window_pattern", "_sliding_window_pattern", default=6)
    default = ["full_attention" if (index + 1) % pattern == 0 else "sliding_attention" for index in range(num_layers)]
    return layer_types(config, num_layers, default)


def _gemma3_ropes(config: ConfigReader, *, head_dim: int, max_position: int) -> dict[str, RopeSpec]:
    """Return one table for global and one for local layers; only the global one may be scaled in old configs."""
    thetas = {
        "full_attention": config.number("rope_theta", default=1_000_000.0),
        "sliding_attention": config.number("rope_local_base_freq", default=10_000.0),
    }
    nested = config.section("rope_parameters")
    sections = {
        "full_attention": (nested and nested.section("full_attention")) or config.section("rope_scaling"),
        "sliding_attention": nested and nested.section("sliding_attention"),
    }
    if nested is not None:
        nested.finish_strictly()
    return {
        kind: RopeSpec(kind="default", theta=theta, rotary_dim=head_dim)
        if (section := sections[kind]) is None
        else read_rope_section(section, theta=theta, rotary_dim=head_dim, max_position=max_position)
        for kind, theta in thetas.items()
    }


GEMMA_FAMILIES = tuple(
    ModelFamily(name=name, architectures=(architecture,), build_spec=build_spec, with_kv_heads=with_key_value_heads)
    for name, architecture, build_spec in (
        ("gemma", "GemmaForCausalLM", _gemma_spec),
        ("gemma2", "Gemma2ForCausalLM", _gemma2_spec),
        ("gemma3_text", "Gemma3ForCausalLM", _gemma3_spec),
    )
)
