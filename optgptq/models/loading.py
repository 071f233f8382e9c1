"""Reads parts of a model from a checkpoint folder, so that no more than one decoder layer need be in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from optgptq.checkpoint.source import TensorSource
from optgptq.models.checks import read_weight
from optgptq.models.ends import Embedding, Head
from optgptq.models.inventory import LinearInfo, embedding_shape, head_shape, layer_linears, norm_shapes
from optgptq.models.layer import DecoderLayer, LayerNorms
from optgptq.models.linear import Linear, LinearLike
from optgptq.models.norm import Norm
from optgptq.models.spec import DecoderSpec

SupplyLinear = Callable[[str], LinearLike | None]
"""Returns the linear of that full name, already decoded or quantized, or None to read it as a dense one."""


class _Read(Protocol):
    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor: ...


def load_embedding(
    folder: TensorSource, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Embedding:
    """Return the input end of the model. Raises ModelError for wrong shapes and values that are not finite."""
    read = _reader(folder, dtype, device)
    names, hidden = spec.names, spec.hidden_size
    positions, project_in = names.position_embedding, names.project_in
    return Embedding(
        spec=spec,
        tokens_VE=_read_tokens(folder, spec, read),
        positions_PM=read(f"{positions}.weight", (spec.num_learned_positions, hidden)) if positions else None,
        project_in_ME=read(f"{project_in}.weight", (hidden, spec.embedding_size)) if project_in else None,
        norm=_load_norm(read, spec, names.embedding_norm, hidden),
    )


def load_head(
    folder: TensorSource,
    spec: DecoderSpec,
    *,
    embedding: Embedding | None = None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    supply_linear: SupplyLinear | None = None,
) -> Head:
    """Return the output end of the model.

    A head of its own in the checkpoint is used even where the config says it is tied, as transformers 5 does.
    `embedding`, where given, shares its weight with a tied head instead of reading it again. `supply_linear` is asked
    for the head first.
    """
    read = _reader(folder, dtype, device)
    names = spec.names
    supplied = None if supply_linear is None else supply_linear(names.head)
    return Head(
        spec=spec,
        project=Linear(_read_head(folder, spec, read, embedding)) if supplied is None else supplied,
        norm=_load_norm(read, spec, names.final_norm, spec.hidden_size),
        project_out_EM=read(f"{names.project_out}.weight", (spec.embedding_size, spec.hidden_size))
        if names.project_out
        else None,
    )


def load_layer(
    folder: TensorSource,
    spec: DecoderSpec,
    index: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    supply_linear: SupplyLinear | None = None,
) -> DecoderLayer:
    """Return decoder layer `index`. Raises ModelError for wrong shapes and values that are not finite."""
    read = _reader(folder, dtype, device)
    linears: dict[str, LinearLike] = {}
    for linear in layer_linears(spec, index):
        supplied = supply_linear(linear.name) if supply_linear is not None else None
        linears[linear.local_name] = _load_linear(read, linear) if supplied is None else supplied
    return DecoderLayer(spec=spec, index=index, linears=linears, norms=_load_layer_norms(read, spec, index))


def _read_tokens(folder: TensorSource, spec: DecoderSpec, read: _Read) -> torch.Tensor:
    ((name, shape),) = embedding_shape(spec).items()
    ((head_name, _),) = head_shape(spec).items()
    return read(head_name if name not in folder.tensors and spec.tied_head else name, shape)


def _read_head(folder: TensorSource, spec: DecoderSpec, read: _Read, embedding: Embedding | None) -> torch.Tensor:
    ((name, shape),) = head_shape(spec).items()
    if name in folder.tensors or not spec.tied_head:
        return read(name, shape)
    return _read_tokens(folder, spec, read) if embedding is None else embedding.tokens_VE


def _load_linear(read: _Read, linear: LinearInfo) -> Linear:
    weight = read(f"{linear.name}.weight", linear.stored_shape)
    weight_OI = weight.t().contiguous() if linear.stored_transposed else weight
    bias_O = read(f"{linear.name}.bias", (linear.out_features,)) if linear.has_bias else None
    return Linear(weight_OI, bias_O)


def _load_layer_norms(read: _Read, spec: DecoderSpec, index: int) -> LayerNorms:
    names, prefix = spec.names, spec.names.layer_prefix(index)

    def norm(local: str | None, size: int) -> Norm | None:
        return _load_norm(read, spec, local and f"{prefix}.{local}", size)

    return LayerNorms(
        attention=norm(names.attention_norm, spec.hidden_size),
        mlp=norm(names.mlp_norm, spec.hidden_size),
        attention_output=norm(names.attention_output_norm, spec.hidden_size),
        mlp_output=norm(names.mlp_output_norm, spec.hidden_size),
        query=norm(names.query_norm, spec.head_dim),
        key=norm(names.key_norm, spec.head_dim),
    )


def _load_norm(read: _Read, spec: DecoderSpec, name: str | None, size: int) -> Norm | None:
    if name is None:
        return None
    shapes = norm_shapes(spec, name, size)
    weight = read(f"{name}.weight", (size,)) if f"{name}.weight" in shapes else None
    bias = read(f"{name}.bias", (size,)) if f"{name}.bias" in shapes else None
    if weight is not None and spec.norm.weight_offset:
        weight = weight.float() + spec.norm.weight_offset
    return Norm(spec.norm, size, weight, bias)


def _reader(folder: TensorSource, dtype: torch.dtype, device: torch.device | str) -> _Read:
    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return read_weight(folder, name, shape, dtype=dtype, device=device)

    return read
