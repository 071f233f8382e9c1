"""OPT: learned positions that begin at row 2, biases; the 350m model norms after its branches and projects its ends."""

from __future__ import annotations

from dataclasses import replace

from optgptq.models.activations import ACTIVATIONS
from optgptq.models.config_reader import ConfigReader
from optgptq.models.families.common import ALL_BIASED, heads
from optgptq.models.family import ModelFamily
from optgptq.models.spec import DecoderSpec, LayerSpec, NormSpec, Stage, TensorNames

_STAGES = (
    Stage(
        name="qkv",
        linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        fused_name="self_attn.qkv_proj",
    ),
    Stage(name="o", linears=("self_attn.out_proj",)),
    Stage(name="gate_up", linears=("fc1",)),
    Stage(name="down", linears=("fc2",)),
)
_NAMES = TensorNames(
    embedding="model.decoder.embed_tokens",
    position_embedding="model.decoder.embed_positions",
    layer="model.decoder.layers.{index}",
    final_norm="model.decoder.final_layer_norm",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
)
# Position 0 is row 2 of the table: rows 0 and 1 were padding in fairseq.
_POSITION_OFFSET = 2


def _opt_spec(config: ConfigReader) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = heads(config, hidden_size=hidden_size, num_heads=num_heads)
    max_position = config.integer("max_position_embeddings", default=2048)
    norm_before = config.flag("do_layer_norm_before", default=True)
    final_norm = norm_before and not config.flag("_remove_final_layer_norm", default=False)
    embedding_size = config.integer("word_embed_proj_dim", default=hidden_size)
    affine = config.flag("layer_norm_elementwise_affine", default=True)
    projected = embedding_size != hidden_size
    spec = DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("ffn_dim", default=4 * hidden_size),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        layers=(LayerSpec(attention_scale=head_dim**-0.5),) * config.integer("num_hidden_layers"),
        norm=NormSpec(kind="layer", eps=1e-5, has_weight=affine, has_bias=affine),
        stages=_STAGES,
        names=replace(
            _NAMES,
            final_norm=_NAMES.final_norm if final_norm else None,
            project_in="model.decoder.project_in" if projected else None,
            project_out="model.decoder.project_out" if projected else None,
        ),
        activation=config.choice("activation_function", allowed=tuple(ACTIVATIONS), default="relu"),
        gated=False,
        norm_after=not norm_before,
        biased_stages=ALL_BIASED if config.flag("enable_bias", default=True) else (),
        max_position=max_position,
        num_learned_positions=max_position + _POSITION_OFFSET,
        learned_offset=_POSITION_OFFSET,
        embedding_size=embedding_size,
        tied_head=config.flag("tie_word_embeddings", default=True),
    )
    config.finish()
    return spec


OPT = ModelFamily(name="opt", architectures=("OPTForCausalLM",), build_spec=_opt_spec, optional_prefix="model.")
