"""One decoder layer with fewer key/value heads, made while the converted model and the original one run side by side.

The new stream runs through the layers as they have been converted so far, the original stream through the original
ones. The heads are measured on the new stream: what the converted layers will read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from optgptq.calibration.stream import ActivationStream, output_error
from optgptq.gqa.grouping import activation_cosines, adjacent_groups, head_similarity, similar_groups
from optgptq.gqa.heads import HeadWeights, read_heads, write_heads
from optgptq.gqa.keys import KeyRule, key_rule, query_weights
from optgptq.gqa.merge import merge_heads, reader_weights
from optgptq.gqa.query_refit import QueryRefit, refit_queries
from optgptq.gqa.refit import OutputRefit, refit_output
from optgptq.gqa.statistics import Groups, HeadMoments, measure_attended, measure_heads
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear
from optgptq.models.spec import STAGE_NAMES, DecoderSpec

Grouping = Literal["similarity", "cosine", "adjacent"]
ConvertedTensors = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]
"""New tensors of a decoder layer by full name, and what was done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupingSettings:
    """How decoder layers are converted.

    Attributes:
        size: key/value heads that become one.
        grouping: how the heads of a group are chosen.
        refit_queries: fit the query projections once more.
        refit_output: fit the output projection once more.
        moment_dtype: accumulator of the moments.
    """

    size: int
    grouping: Grouping
    refit_queries: bool
    refit_output: bool
    moment_dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ConvertedLayer:
    """Attention of one decoder layer after the conversion.

    Attributes:
        layer: with the stored values of its new weights.
        tensors: the new weights and biases of attention by full name, in the dtypes of the checkpoint.
        record: what was done, as plain values.
    """

    layer: DecoderLayer
    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]


def convert_layer(
    streams: tuple[ActivationStream, ActivationStream],
    layer: DecoderLayer,
    new_spec: DecoderSpec,
    settings: GroupingSettings,
    *,
    stored_dtype: Callable[[str], torch.dtype],
) -> ConvertedLayer:
    """Return the converted layer and take both streams through it.

    Args:
        streams: the new and the original one before the layer, of the same windows in the same batches.
        layer: the original one, dense.
        new_spec: the converted model.
        settings: how.
        stored_dtype: dtype of a tensor of the converted checkpoint by its full name.

    Raises:
        NumericalError: activations are not finite.
    """
    converted = replace(layer, spec=new_spec, linears=dict(layer.linears))
    tensors, record = _share(streams[0], layer, converted, settings, stored_dtype=stored_dtype)
    streams[0].advance(converted, "qkv")
    streams[1].advance(layer, "qkv")
    if settings.refit_output:
        refit = refit_output(streams, (converted, layer), dtype=settings.moment_dtype)
        record |= _refit_record(refit)
        if refit.linear is not None:
            (name,) = new_spec.stage("o").linears
            tensors |= _store(converted, {name: refit.linear}, stored_dtype)
    for stage in STAGE_NAMES[1:]:
        streams[0].advance(converted, stage)
        streams[1].advance(layer, stage)
    record["output_error"] = output_error(*streams)
    return ConvertedLayer(layer=converted, tensors=tensors, record=record)


def restored_layer(layer: DecoderLayer, new_spec: DecoderSpec, known: ConvertedTensors) -> ConvertedLayer:
    """Return what `convert_layer` returned for `layer` from its tensors and its record; no stream moves."""
    tensors, record = known
    converted = replace(layer, spec=new_spec, linears=dict(layer.linears))
    prefix = layer.spec.names.layer_prefix(layer.index)
    for name in (*new_spec.stage("qkv").linears, *new_spec.stage("o").linears):
        before = layer.linears[name]
        assert isinstance(before, Linear)
        weight_OI, bias_O = tensors[f"{prefix}.{name}.weight"], tensors.get(f"{prefix}.{name}.bias")
        like = before.weight_OI
        converted.linears[name] = Linear(weight_OI.to(like), None if bias_O is None else bias_O.to(like))
    return ConvertedLayer(layer=converted, tensors=dict(tensors), record=dict(record))


def _share(
    stream: ActivationStream,
    layer: DecoderLayer,
    converted: DecoderLayer,
    settings: GroupingSettings,
    *,
    stored_dtype: Callable[[str], torch.dtype],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Merge the heads of `layer` and put the new attention into `converted`; return its tensors and what was done."""
    rule, heads = key_rule(layer.spec, layer.index), read_heads(layer)
    moments = measure_heads(stream, layer, dtype=settings.moment_dtype)
    groups = _groups(heads, moments, rule, settings)
    attended = measure_attended(stream, layer, groups, dtype=settings.moment_dtype)
    merged = merge_heads(heads, moments, attended, groups, rule)
    record: dict[str, Any] = {
        "index": layer.index,
        "groups": [list(group) for group in groups],
        "key_error": merged.key_error,
        "value_error": merged.value_error,
    }
    tensors = _store(converted, write_heads(merged.heads, converted.spec), stored_dtype)
    if settings.refit_queries:
        refit = refit_queries(stream, (converted, layer), (merged.heads, heads), groups)
        record |= _query_record(refit)
        tensors = _store(converted, write_heads(refit.heads, converted.spec), stored_dtype)
    return tensors, record


def _groups(heads: HeadWeights, moments: HeadMoments, rule: KeyRule, settings: GroupingSettings) -> Groups:
    if settings.grouping == "adjacent":
        return adjacent_groups(len(moments.key_KDKD), settings.size)
    if settings.grouping == "cosine":
        return similar_groups(activation_cosines(moments), settings.size)
    weights = query_weights(moments), reader_weights(heads)
    return similar_groups(head_similarity(weights, moments, rule), settings.size)


def _store(
    layer: DecoderLayer, linears: dict[str, Linear], stored_dtype: Callable[[str], torch.dtype]
) -> dict[str, torch.Tensor]:
    """Put linears into the layer as they will be read back, and return their tensors by full name."""
    prefix = layer.spec.names.layer_prefix(layer.index)
    tensors: dict[str, torch.Tensor] = {}
    for local_name, linear in linears.items():
        before = layer.linears[local_name]
        assert isinstance(before, Linear)
        dtype = before.weight_OI.dtype
        name = f"{prefix}.{local_name}"
        weight_OI = _plain(linear.weight_OI, stored_dtype(f"{name}.weight"))
        tensors[f"{name}.weight"] = weight_OI
        bias_O = None
        if linear.bias_O is not None:
            bias_O = _plain(linear.bias_O, stored_dtype(f"{name}.bias"))
            tensors[f"{name}.bias"] = bias_O
        layer.linears[local_name] = Linear(weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
    return tensors


def _plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers as a file gives them back: products of other strides may differ in the last bit."""
    return tensor.to(dtype).clone(memory_format=torch.contiguous_format)


def _query_record(refit: QueryRefit) -> dict[str, Any]:
    return {
        "query_refit": {
            "accepted_heads": refit.num_accepted,
            "held_out_error_before": refit.error_before,
            "held_out_error_after": refit.error_after,
        }
    }


def _refit_record(refit: OutputRefit) -> dict[str, Any]:
    return {
        "output_refit": {
            "accepted": refit.linear is not None,
            "damp_ratio": refit.damp_ratio,
            "held_out_error_before": refit.error_before,
            "held_out_error_after": refit.error_after,
        }
    }
