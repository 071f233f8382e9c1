"""Tiny random models of every family, made by transformers: the reference our own decoder is compared with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """One configuration of one family.

    Attributes:
        name: test id.
        architecture: class name in transformers.
        config: config class name in transformers.
        values: config values; every size is small and as few as possible divide each other.
    """

    name: str
    architecture: str
    config: str
    values: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0, "original_max_position_embeddings": 128}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5000.0,
}
_GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
_GEMMA = {**_LLAMA, "head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 7}
_PHI3 = {
    **_LLAMA,
    "hidden_size": 48,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.3],
        "long_factor": [1.5, 2.0, 4.0],
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.75,
    },
}
_NEOX = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 512,
}
_GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 512, "bos_token_id": 0}
_GPT2 |= {"eos_token_id": 0}
_OPT = {
    "vocab_size": 61,
    "hidden_size": 24,
    "ffn_dim": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 512,
}
_BLOOM = {"vocab_size": 61, "hidden_size": 24, "n_layer": 2, "n_head": 4}
_MPT = {"vocab_size": 61, "d_model": 24, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}
_FALCON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}
_FALCON_RW = {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}
_FALCON_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}


def _cases(architecture: str, config: str, base: Mapping[str, Any], **variants: Mapping[str, Any]) -> list[TinyModel]:
    family = config.removesuffix("Config").lower()
    return [
        TinyModel(name=f"{family}-{variant}", architecture=architecture, config=config, values={**base, **values})
        for variant, values in variants.items()
    ]


def _rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0, **values}}


TINY_MODELS: tuple[TinyModel, ...] = (
    *_cases(
        "LlamaForCausalLM",
        "LlamaConfig",
        _LLAMA,
        grouped_query={},
        tied={"tie_word_embeddings": True},
        multi_query={"num_key_value_heads": 1},
        multi_head_biases={"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True},
        explicit_head_dim={"head_dim": 10, "rms_norm_eps": 1e-3},
        other_activation={"hidden_act": "gelu"},
        rope_linear=_rope(rope_type="linear", factor=4.0),
        rope_dynamic={**_rope(rope_type="dynamic", factor=4.0), "max_position_embeddings": 16, "head_dim": 8},
        rope_llama3={"rope_parameters": _LLAMA3, "head_dim": 16},
        rope_yarn={"rope_parameters": _YARN, "head_dim": 16},
        rope_yarn_scales={
            "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
            "head_dim": 16,
        },
    ),
    *_cases(
        "MistralForCausalLM",
        "MistralConfig",
        _LLAMA,
        short_window={"sliding_window": 5},
        no_window={"sliding_window": None, "head_dim": 6},
    ),
    *_cases(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        _LLAMA,
        biases={},
        late_window={"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    *_cases(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**_LLAMA, "head_dim": 10},
        norms={},
        biases_tied={"attention_bias": True, "tie_word_embeddings": True},
    ),
    *_cases(
        "GemmaForCausalLM",
        "GemmaConfig",
        {**_LLAMA, "head_dim": 10},
        plain={},
        multi_query={"num_key_value_heads": 1},
    ),
    *_cases(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _GEMMA,
        softcaps={"attn_logit_softcapping": 3.0},
        no_caps={"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    *_cases(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_GEMMA, "num_hidden_layers": 4, "sliding_window_pattern": 2},
        local_global={"rope_parameters": _GEMMA3_ROPES},
        final_cap={"final_logit_softcapping": 5.0},
    ),
    *_cases(
        "Phi3ForCausalLM",
        "Phi3Config",
        _PHI3,
        longrope={},
        default_window={"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "sliding_window": 9},
    ),
    *_cases(
        "GPT2LMHeadModel",
        "GPT2Config",
        _GPT2,
        conv1d={},
        inverse_layer={"scale_attn_by_inverse_layer_idx": True, "n_inner": 31, "activation_function": "relu"},
        unscaled={"scale_attn_weights": False, "tie_word_embeddings": False},
    ),
    *_cases(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _NEOX,
        parallel={},
        sequential={"use_parallel_residual": False, "attention_bias": False},
        full_rotary=_rope(partial_rotary_factor=1.0),
    ),
    *_cases(
        "OPTForCausalLM",
        "OPTConfig",
        _OPT,
        pre_norm={},
        post_norm_projected={"do_layer_norm_before": False, "word_embed_proj_dim": 14},
        no_biases={"enable_bias": False, "layer_norm_elementwise_affine": False},
        pre_norm_projected={"word_embed_proj_dim": 14},
        no_final_norm={"_remove_final_layer_norm": True},
    ),
    *_cases(
        "BloomForCausalLM",
        "BloomConfig",
        _BLOOM,
        alibi={},
        six_heads={"n_head": 6},
        residual_after_norm={"apply_residual_connection_post_layernorm": True},
    ),
    *_cases(
        "MptForCausalLM",
        "MptConfig",
        _MPT,
        alibi={},
        six_heads_clipped={"n_heads": 6, "attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.3}},
    ),
    *_cases(
        "FalconForCausalLM",
        "FalconConfig",
        _FALCON,
        multi_query={},
        rw_alibi=_FALCON_RW,
        rw_rotary={**_FALCON_RW, "alibi": False},
        multi_head_parallel={"multi_query": False, "bias": True},
        multi_query_alibi={"alibi": True},
        grouped=_FALCON_NEW,
        grouped_one_norm={**_FALCON_NEW, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 50},
        untied={"tie_word_embeddings": False},
    ),
)


def reference_model(tiny: TinyModel, *, seed: int = 0) -> Any:
    """Return the transformers model in float32 with every parameter random, norms and biases included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        config = getattr(transformers, tiny.config)(**tiny.values)
        # Falcon's eager path adds its ALiBi bias twice (transformers 5.23); its default path does not.
        config._attn_implementation = "sdpa" if tiny.architecture.startswith("Falcon") else "eager"
        model = getattr(transformers, tiny.architecture)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") and "gemma" not in tiny.name else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def save_reference(model: Any, folder: Path) -> Path:
    """Write the model as transformers does and return the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def reference_logits(model: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return the logits of transformers."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(tokens_BS, use_cache=False).logits.float()


def random_tokens(num_sequences: int, num_positions: int, *, vocab_size: int = 61, seed: int = 1) -> torch.Tensor:
    """Return int64 tokens `[B, S]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, (num_sequences, num_positions), generator=generator)


def reference_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Return the tokens that the `generate` of transformers adds, the likeliest each time and with its cache."""
    tokens_BS = torch.tensor([prompt])
    # Rotary tables of kind `dynamic` remember the longest text of earlier calls.
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = model.generate(
            tokens_BS, attention_mask=torch.ones_like(tokens_BS), max_new_tokens=num_tokens, do_sample=False
        )
    return [int(token) for token in written[0, len(prompt) :]]
