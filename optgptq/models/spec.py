"""What a decoder computes, as data: everything the one generic decoder of this package needs to know about a model.

A `DecoderSpec` is made from `config.json` by a family record and holds no tensors and no torch types.
Shapes: `O` output rows, `I` input columns, `M` model width, `N` query heads, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

StageName = Literal["qkv", "o", "gate_up", "down"]
# Where a linear is: a stage of a decoder layer, or the output head behind all of them.
Place = Literal[StageName, "head"]
NormKind = Literal["rms", "layer"]
RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope", "dynamic"]
QKVLayout = Literal["split", "concatenated", "per_head_interleaved", "grouped_interleaved"]
Residual = Literal["sequential", "parallel", "parallel_shared_norm"]

STAGE_NAMES: tuple[StageName, ...] = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The linears of a decoder layer that read the same input, in the order in which their outputs are used.

    Attributes:
        name: which of the four stages.
        linears: module names relative to the decoder layer. `qkv` holds query, key, value or one fused linear;
            `gate_up` holds gate, up or one fused linear, or the single input linear of a plain feed-forward.
        fused_name: relative name under which engines load several linears as one; empty where there is no such name.
    """

    name: StageName
    linears: tuple[str, ...]
    fused_name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """How every norm of the model works.

    Attributes:
        kind: `rms` or `layer` (with mean subtraction).
        eps: added to the variance.
        weight_offset: added to the stored weight before use; 1 for Gemma.
        has_weight: False where a layer norm is not affine at all.
        has_bias: whether a bias is stored.
    """

    kind: NormKind
    eps: float
    weight_offset: int = 0
    has_weight: bool = True
    has_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """One rotary table. The fields that a kind does not use keep their defaults, so equal tables compare equal.

    Attributes:
        kind: how the frequencies are scaled for long text.
        theta: base period.
        rotary_dim: leading features of a head that are rotated, even.
        factor: scaling factor of the frequencies.
        max_position: positions the config promises (`dynamic` scales beyond them).
        original_max_position: positions of pre-training.
        attention_factor: factor on cosine and sine.
        low_freq_factor, high_freq_factor: `llama3` only.
        beta_fast, beta_slow, truncate: `yarn` only.
        short_factor, long_factor: `longrope` only, one number per pair of features.
    """

    kind: RopeKind
    theta: float
    rotary_dim: int
    factor: float = 1.0
    max_position: int = 0
    original_max_position: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AlibiSpec:
    """Bias `slope * key position` on the attention scores, added after their scaling.

    Attributes:
        slopes: one per query head.
        scale: factor on the bias (Falcon scales it together with the scores).
        bfloat16_bias: slopes, positions and product are rounded to bfloat16 before scaling, as in Falcon.
    """

    slopes: tuple[float, ...]
    scale: float = 1.0
    bfloat16_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What differs between decoder layers.

    Attributes:
        attention_scale: factor on query-key products.
        sliding_window: keys a query sees, its own included; None for all before it.
        rope: rotary table, None where positions are learned or biases.
    """

    attention_scale: float
    sliding_window: int | None = None
    rope: RopeSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Module names in the checkpoint; `.weight` and `.bias` are appended. None: the model has no such module.

    `layer` has the field `{index}`. The names from `attention_norm` on are relative to the decoder layer, the
    others are whole. `ignored` are endings of tensors that hold no weights (masks, rotary buffers).
    """

    embedding: str
    layer: str
    final_norm: str | None
    head: str = "lm_head"
    position_embedding: str | None = None
    embedding_norm: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    attention_norm: str
    mlp_norm: str | None
    attention_output_norm: str | None = None
    mlp_output_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    ignored: tuple[str, ...] = ()

    def layer_prefix(self, index: int) -> str:
        """Return the name of decoder layer `index`, without a final dot."""
        return self.layer.format(index=index)

    def without_prefix(self, prefix: str) -> TensorNames:
        """Return the names with `prefix` removed from every whole name that begins with it."""
        return replace(
            self,
            embedding=self.embedding.removeprefix(prefix),
            layer=self.layer.removeprefix(prefix),
            final_norm=self.final_norm and self.final_norm.removeprefix(prefix),
            head=self.head.removeprefix(prefix),
            position_embedding=self.position_embedding and self.position_embedding.removeprefix(prefix),
            embedding_norm=self.embedding_norm and self.embedding_norm.removeprefix(prefix),
            project_in=self.project_in and self.project_in.removeprefix(prefix),
            project_out=self.project_out and self.project_out.removeprefix(prefix),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A causal language model, complete but for its weights.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim: sizes.
        layers: one record per decoder layer.
        norm: the one kind of norm the model uses.
        stages: the four stages of a decoder layer in order.
        names: where the tensors are.
        activation: key of `optgptq.models.activations.ACTIVATIONS`.
        gated: the feed-forward is `down(activation(gate(x)) * up(x))`, else `down(activation(up(x)))`.
        qkv_layout: how a fused query-key-value output is split into heads.
        residual: `parallel` adds attention and feed-forward to the same input.
        norm_after: norms follow the residual sums instead of opening the branches (OPT-350m).
        residual_after_norm: the residual is the normed input of a branch (BLOOM option).
        biased_stages: stages whose linears have a bias.
        max_position: positions the config promises; None where any number works.
        num_learned_positions: rows of the position table, 0 where there is none.
        learned_offset: row of position 0.
        embedding_size: width of the token embedding where it is projected to `hidden_size`.
        embedding_scale: factor on token embeddings, rounded to their dtype.
        alibi: attention bias, None where there is none.
        attention_softcap, logit_softcap: `cap * tanh(x / cap)` on scores or logits.
        logit_scale: factor on logits.
        clip_qkv: bound on the absolute value of queries, keys and values before they are split.
        tied_head: the head is the token embedding unless the checkpoint holds a head of its own.
        stored_transposed: linears are stored `[I, O]` (GPT-2).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    stages: tuple[Stage, ...]
    names: TensorNames
    activation: str
    gated: bool
    qkv_layout: QKVLayout = "split"
    residual: Residual = "sequential"
    norm_after: bool = False
    residual_after_norm: bool = False
    biased_stages: tuple[StageName, ...] = ()
    max_position: int | None
    num_learned_positions: int = 0
    learned_offset: int = 0
    embedding_size: int
    embedding_scale: float | None = None
    alibi: AlibiSpec | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    logit_scale: float | None = None
    clip_qkv: float | None = None
    tied_head: bool
    stored_transposed: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def ropes(self) -> frozenset[RopeSpec]:
        """The distinct rotary tables of the model."""
        return frozenset(layer.rope for layer in self.layers if layer.rope is not None)

    @property
    def position_limit(self) -> int | None:
        """Positions that the model's position table holds; None where there is no table."""
        return self.num_learned_positions - self.learned_offset if self.num_learned_positions else None

    def stage(self, name: StageName) -> Stage:
        """Return the stage called `name`."""
        return next(stage for stage in self.stages if stage.name == name)

    def linear_names(self, index: int, stage: StageName) -> tuple[str, ...]:
        """Return the full module names of the linears of one stage of decoder layer `index`."""
        prefix = self.names.layer_prefix(index)
        return tuple(f"{prefix}.{local}" for local in self.stage(stage).linears)
