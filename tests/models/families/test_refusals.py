"""Config values that a family does not implement are refused by their key."""

from __future__ import annotations

from typing import Any

import pytest

from optgptq.errors import ModelError
from optgptq.models.registry import config_spec

PLAIN: dict[str, Any] = {"vocab_size": 11, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
NEOX = {**PLAIN, "intermediate_size": 30}
LLAMA = {**NEOX, "num_key_value_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"vocab_size": 11, "n_embd": 24, "n_layer": 2, "n_head": 6},
    "GPTNeoXForCausalLM": NEOX,
    "BloomForCausalLM": {"vocab_size": 11, "hidden_size": 24, "n_layer": 2, "n_head": 6},
    "MptForCausalLM": {"vocab_size": 11, "d_model": 24, "n_layers": 2, "n_heads": 6},
    "OPTForCausalLM": PLAIN,
    "FalconForCausalLM": PLAIN,
}


@pytest.mark.parametrize(
    ("architecture", "change", "where"),
    [
        ("LlamaForCausalLM", {"hidden_act": "relu6"}, "hidden_act"),
        ("LlamaForCausalLM", {"hidden_size": 25}, "num_attention_heads"),
        ("LlamaForCausalLM", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("LlamaForCausalLM", {"num_local_experts": 8}, "num_local_experts"),
        ("LlamaForCausalLM", {"vocab_size": None}, "vocab_size"),
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("Qwen2ForCausalLM", {"attention_bias": False}, "attention_bias"),
        ("Qwen3ForCausalLM", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("GemmaForCausalLM", {"hidden_act": "silu"}, "hidden_act"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"chunked_attention": {}}}, "rope_parameters: chunked_attention"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "add_cross_attention"),
        ("GPT2LMHeadModel", {"activation_function": "mish"}, "activation_function"),
        ("BloomForCausalLM", {"n_inner": 17}, "n_inner"),
        ("MptForCausalLM", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
        ("MptForCausalLM", {"no_bias": False}, "no_bias"),
        ("MptForCausalLM", {"norm_type": "rmsnorm"}, "norm_type"),
        ("MptForCausalLM", {"attn_config": {"qk_ln": True}}, "attn_config: qk_ln"),
        ("MptForCausalLM", {"attn_config": {"alibi": False}}, "attn_config: alibi"),
        ("MptForCausalLM", {"attn_config": {"alibi_bias_max": 16}}, "attn_config: alibi_bias_max"),
        ("MptForCausalLM", {"attn_config": {"rope": True}}, "attn_config: rope"),
        ("OPTForCausalLM", {"activation_function": "tanh"}, "activation_function"),
        ("GPTNeoXForCausalLM", {"rope_parameters": {"rope_type": "axial"}}, "rope_parameters: rope_type"),
        ("FalconForCausalLM", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
        ("FalconForCausalLM", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ("FalconForCausalLM", {"multi_query": False, "num_kv_heads": 3}, "num_kv_heads"),
        ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 4}, "num_kv_heads"),
    ],
)
def test_values_that_are_not_implemented_are_refused_by_key(
    architecture: str, change: dict[str, Any], where: str
) -> None:
    config = {"architectures": [architecture], **SIZES.get(architecture, LLAMA)}
    config_spec(config)
    with pytest.raises(ModelError) as caught:
        config_spec({**config, **change})
    assert caught.value.where == f"config.json: {where}"
