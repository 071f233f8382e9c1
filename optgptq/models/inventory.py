"""Which tensors a model must have and which of them are linears to quantize, from its spec alone.

Shapes: `O` output rows, `I` input columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from optgptq.models.spec import STAGE_NAMES, DecoderSpec, Place, StageName


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearInfo:
    """One linear inside a decoder layer, or the output head behind them.

    Attributes:
        name: full module name.
        layer_index: its decoder layer; the head's is the number of decoder layers.
        stage: its stage, or `head`.
        local_name: name relative to the decoder layer; the head's is its full name.
        out_features, in_features: `O` and `I`, whatever way the checkpoint stores the weight.
        has_bias: a bias is stored.
        stored_transposed: the checkpoint stores `[I, O]`.
        fused_names: full names of the linears that engines load as one, this one included, in their order.
        fused_name: full name of the fused linear; equal to `name` where there is none.
    """

    name: str
    layer_index: int
    stage: Place
    local_name: str
    out_features: int
    in_features: int
    has_bias: bool
    stored_transposed: bool
    fused_names: tuple[str, ...]
    fused_name: str

    @property
    def stored_shape(self) -> tuple[int, int]:
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.stored_transposed else shape


def model_linears(spec: DecoderSpec) -> tuple[LinearInfo, ...]:
    """Return every linear of every decoder layer, layer by layer, stage by stage."""
    return tuple(linear for index in range(spec.num_layers) for linear in layer_linears(spec, index))


def outer_linears(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """Return `(O, I)` by full name of the linears outside the decoder layers: the head and OPT's projections."""
    linears = {spec.names.head: (spec.vocab_size, spec.embedding_size)}
    if spec.names.project_in:
        linears[spec.names.project_in] = (spec.hidden_size, spec.embedding_size)
    if spec.names.project_out:
        linears[spec.names.project_out] = (spec.embedding_size, spec.hidden_size)
    return linears


def head_linear(spec: DecoderSpec) -> LinearInfo:
    """Return the output head."""
    name = spec.names.head
    return LinearInfo(
        name=name,
        layer_index=spec.num_layers,
        stage="head",
        local_name=name,
        out_features=spec.vocab_size,
        in_features=spec.embedding_size,
        has_bias=False,
        stored_transposed=False,
        fused_names=(name,),
        fused_name=name,
    )


def layer_linears(spec: DecoderSpec, index: int) -> tuple[LinearInfo, ...]:
    """Return the linears of decoder layer `index` in the order of the stages."""
    return tuple(linear for stage in STAGE_NAMES for linear in _stage_linears(spec, index, stage))


def _stage_linears(spec: DecoderSpec, index: int, stage_name: StageName) -> list[LinearInfo]:
    stage = spec.stage(stage_name)
    prefix = spec.names.layer_prefix(index)
    names = spec.linear_names(index, stage_name)
    fused = bool(stage.fused_name)
    return [
        LinearInfo(
            name=name,
            layer_index=index,
            stage=stage_name,
            local_name=local_name,
            out_features=out_features,
            in_features=in_features,
            has_bias=stage_name in spec.biased_stages,
            stored_transposed=spec.stored_transposed,
            fused_names=names if fused else (name,),
            fused_name=f"{prefix}.{stage.fused_name}" if fused else name,
        )
        for name, local_name, (out_features, in_features) in zip(
            names, stage.linears, _stage_shapes(spec, stage_name), strict=True
        )
    ]


def _stage_shapes(spec: DecoderSpec, stage: StageName) -> list[tuple[int, int]]:
    """Return `(O, I)` of each linear of a stage."""
    query, key_value = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    if stage == "qkv":
        rows = [query, key_value, key_value]
        return [(count, spec.hidden_size) for count in (rows if spec.qkv_layout == "split" else [sum(rows)])]
    if stage == "o":
        return [(spec.hidden_size, query)]
    if stage == "down":
        return [(spec.hidden_size, spec.intermediate_size)]
    if not spec.gated:
        return [(spec.intermediate_size, spec.hidden_size)]
    if len(spec.stage("gate_up").linears) == 1:
        return [(2 * spec.intermediate_size, spec.hidden_size)]
    return [(spec.intermediate_size, spec.hidden_size)] * 2


def expected_tensors(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Return stored shape by name of every tensor the model must have.

    Of a tied pair the embedding is listed; a checkpoint may hold it under the head's name instead, or both.
    """
    names = spec.names
    shapes: dict[str, tuple[int, ...]] = embedding_shape(spec)
    if names.position_embedding:
        shapes[f"{names.position_embedding}.weight"] = (spec.num_learned_positions, spec.hidden_size)
    if names.project_in:
        shapes[f"{names.project_in}.weight"] = (spec.hidden_size, spec.embedding_size)
    if names.project_out:
        shapes[f"{names.project_out}.weight"] = (spec.embedding_size, spec.hidden_size)
    if not spec.tied_head:
        shapes |= head_shape(spec)
    for norm in (names.embedding_norm, names.final_norm):
        shapes |= norm_shapes(spec, norm, spec.hidden_size)
    for index in range(spec.num_layers):
        shapes |= layer_tensors(spec, index)
    return shapes


def embedding_shape(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the token embedding's weight."""
    return {f"{spec.names.embedding}.weight": (spec.vocab_size, spec.embedding_size)}


def head_shape(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the head's weight."""
    return {f"{spec.names.head}.weight": (spec.vocab_size, spec.embedding_size)}


def layer_tensors(spec: DecoderSpec, index: int) -> dict[str, tuple[int, ...]]:
    """Return stored shape by name of every tensor of decoder layer `index`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in layer_linears(spec, index):
        shapes[f"{linear.name}.weight"] = linear.stored_shape
        if linear.has_bias:
            shapes[f"{linear.name}.bias"] = (linear.out_features,)
    names, prefix = spec.names, spec.names.layer_prefix(index)
    for local, size in (
        (names.attention_norm, spec.hidden_size),
        (names.mlp_norm, spec.hidden_size),
        (names.attention_output_norm, spec.hidden_size),
        (names.mlp_output_norm, spec.hidden_size),
        (names.query_norm, spec.head_dim),
        (names.key_norm, spec.head_dim),
    ):
        shapes |= norm_shapes(spec, local and f"{prefix}.{local}", size)
    return shapes


def norm_shapes(spec: DecoderSpec, name: str | None, size: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one norm; none when `name` is None."""
    if name is None or not spec.norm.has_weight:
        return {}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,)}
    if spec.norm.has_bias:
        shapes[f"{name}.bias"] = (size,)
    return shapes
