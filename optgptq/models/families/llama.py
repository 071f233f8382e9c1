"""Llama and the families that differ from it little: Mistral (window), Qwen2 (biases), Qwen3 (query and key norm)."""

from __future__ import annotations

from dataclasses import replace

from optgptq.models.activations import ACTIVATIONS
from optgptq.models.config_reader import ConfigReader
from optgptq.models.families.common import LLAMA_STAGES, heads, layer_windows, with_key_value_heads
from optgptq.models.family import ModelFamily
from optgptq.models.rope_config import read_rope
from optgptq.models.spec import DecoderSpec, LayerSpec, NormSpec, StageName, TensorNames

LLAMA_NAMES = TensorNames(
    embedding="model.embed_tokens",
    layer="model.layers.{index}",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    ignored=(".rotary_emb.inv_freq",),
)


def _llama_shape(
    config: ConfigReader,
    *,
    max_position: int,
    default_head_dim: int | None = None,
    biased_stages: tuple[StageName, ...] = (),
) -> DecoderSpec:
    """Return the spec that all families of this file share; windows and names are the caller's to change."""
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = config.optional_integer("head_dim", absent=default_head_dim)
    head_dim = head_dim or heads(config, hidden_size=hidden_size, num_heads=num_heads)
    num_kv_heads = config.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise config.refusal("num_key_value_heads", num_kv_heads, expected=f"a divisor of {num_heads} query heads")
    max_position = config.integer("max_position_embeddings", default=max_position)
    rope = read_rope(config, head_dim=head_dim, max_position=max_position)
    layer = LayerSpec(attention_scale=head_dim**-0.5, rope=rope)
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm=NormSpec(kind="rms", eps=config.number("rms_norm_eps", default=1e-6)),
        stages=LLAMA_STAGES,
        names=LLAMA_NAMES,
        activation=config.choice("hidden_act", allowed=tuple(ACTIVATIONS), default="silu"),
        gated=True,
        biased_stages=biased_stages,
        max_position=max_position,
        embedding_size=hidden_size,
        tied_head=config.flag("tie_word_embeddings", default=False),
    )


def _with_windows(spec: DecoderSpec, windows: tuple[int | None, ...]) -> DecoderSpec:
    layers = (replace(layer, sliding_window=window) for layer, window in zip(spec.layers, windows, strict=True))
    return replace(spec, layers=tuple(layers))


def _llama_spec(config: ConfigReader) -> DecoderSpec:
    biased: tuple[StageName, ...] = ("qkv", "o") if config.flag("attention_bias", default=False) else ()
    biased += ("gate_up", "down") if config.flag("mlp_bias", default=False) else ()
    spec = _llama_shape(config, max_position=2048, biased_stages=biased)
    config.finish()
    return spec


def _mistral_spec(config: ConfigReader) -> DecoderSpec:
    spec = _llama_shape(config, max_position=131_072)
    window = config.optional_integer("sliding_window", absent=4096)
    config.require("attention_bias", False)
    config.finish()
    return _with_windows(spec, (window,) * spec.num_layers)


def _qwen_windows(config: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    window = config.optional_integer("sliding_window", absent=4096)
    window = window if config.flag("use_sliding_window", default=False) else None
    first = config.integer("max_window_layers", default=28, minimum=0)
    sliding = "sliding_attention" if window is not None else "full_attention"
    default = ["full_attention" if index < first else sliding for index in range(num_layers)]
    return layer_windows(config, num_layers, window=window, default_types=default)


def _qwen2_spec(config: ConfigReader) -> DecoderSpec:
    spec = _llama_shape(config, max_position=32_768, biased_stages=("qkv",))
    windows = _qwen_windows(config, spec.num_layers)
    config.require("attention_bias", True)
    config.finish()
    return _with_windows(spec, windows)


def _qwen3_spec(config: ConfigReader) -> DecoderSpec:
    biased: tuple[StageName, ...] = ("qkv", "o") if config.flag("attention_bias", default=False) else ()
    spec = _llama_shape(config, max_position=32_768, default_head_dim=128, biased_stages=biased)
    windows = _qwen_windows(config, spec.num_layers)
    config.finish()
    names = replace(spec.names, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
    return _with_windows(replace(spec, names=names), windows)


LLAMA_FAMILIES = tuple(
    ModelFamily(name=name, architectures=(architecture,), build_spec=build_spec, with_kv_heads=with_key_value_heads)
    for name, architecture, build_spec in (
        ("llama", "LlamaForCausalLM", _llama_spec),
        ("mistral", "MistralForCausalLM", _mistral_spec),
        ("qwen2", "Qwen2ForCausalLM", _qwen2_spec),
        ("qwen3", "Qwen3ForCausalLM", _qwen3_spec),
    )
)
