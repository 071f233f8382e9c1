"""What is in a checkpoint: its format, how many bits its weights take, and what its manifest says of every linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optgptq.checkpoint.folder import CheckpointFolder, TensorInfo
from optgptq.checkpoint.manifest import read_manifest
from optgptq.formats import CheckpointFormat, detect
from optgptq.formats.fp8_scales import Fp8Summary, fp8_summary
from optgptq.formats.kv_cache_keys import CACHE_KEY
from optgptq.layout import LinearLayout
from optgptq.reports.kv_cache import CacheReport, cache_report
from optgptq.reports.wording import number


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One quantized linear; losses and damping are None where no manifest tells them.

    Attributes:
        name: full module name.
        out_features: rows.
        in_features: columns.
        bits: bits per code.
        group_size: columns per group, -1 for one group per row.
        symmetric: whether the zero points are all in the middle, by the configuration.
        coefficients: how the coefficients of binary codes are stored; None where the grid is uniform.
        bits_per_weight: codes and everything that is stored beside them to decode them.
        loss: relative loss when it was solved.
        rtn_loss: relative loss of rounding to nearest.
        damp_ratio_used: damping with which it was solved.
        notes: what the solver had to say.
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    symmetric: bool
    coefficients: str | None
    bits_per_weight: float
    loss: float | None
    rtn_loss: float | None
    damp_ratio_used: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport:
    """A checkpoint.

    Attributes:
        format: name of the format, `dense` where nothing is quantized.
        architecture: the first entry of `architectures`.
        bits_per_weight: codes, scales and stored zero points over the quantized weights; None where there are none.
        num_quantized_weights: weights that codes stand for.
        num_tensors: stored tensors.
        tensor_bytes: all stored tensors.
        quantized_bytes: the tensors of quantized linears, padding and indices included, biases not.
        layers: one entry per quantized linear, in the order of the model.
        dense: linears of decoder layers that stay dense, name and reason; the reason is empty where nobody tells.
        decoder_layers: output error per decoder layer, from the manifest.
        recipe: name of the recipe, from the manifest; empty where there is none.
        made_by: version of optgptq that made it; None for foreign checkpoints.
        warnings: from the manifest.
        kv_cache: the quantized KV cache that it asks for, None where it asks for none.
        fp8_cache: scales of an fp8 KV cache for other engines, None where there are none.
    """

    format: str
    architecture: str
    bits_per_weight: float | None
    num_quantized_weights: int
    num_tensors: int
    tensor_bytes: int
    quantized_bytes: int
    layers: tuple[LayerReport, ...]
    dense: tuple[Mapping[str, str], ...]
    decoder_layers: tuple[Mapping[str, Any], ...]
    recipe: str
    made_by: str | None
    warnings: tuple[str, ...]
    kv_cache: CacheReport | None
    fp8_cache: Fp8Summary | None


def inspect_checkpoint(folder: CheckpointFolder) -> InspectReport:
    """Return the report of a dense or quantized checkpoint; headers and JSON are read, weights are not.

    Raises:
        FormatError: its configuration cannot be understood.
        ModelError: it asks for a quantized KV cache, and its model is not known.
    """
    form = detect(folder)
    manifest = read_manifest(folder.path) or {}
    layouts = form.read_layouts(folder) if form is not None else ()
    solved = {entry["name"]: entry for entry in _entries(manifest, "layers") if isinstance(entry.get("name"), str)}
    layers, stored_bits, quantized_bytes = [], 0, 0
    for layout in layouts:
        if layout.bits is None or form is None:
            continue
        tensors = _own_tensors(folder, form, layout)
        layer_bits = form.stored_bits(layout, tensors)
        stored_bits += layer_bits
        quantized_bytes += sum(tensor.num_bytes for tensor in tensors)
        layers.append(_layer(layout, layout.bits, layer_bits, solved.get(layout.name, {})))
    num_weights = sum(layer.out_features * layer.in_features for layer in layers)
    return InspectReport(
        format=form.name if form is not None else "dense",
        architecture=_architecture(folder),
        bits_per_weight=stored_bits / num_weights if num_weights else None,
        num_quantized_weights=num_weights,
        num_tensors=len(folder.tensors),
        tensor_bytes=sum(tensor.num_bytes for tensor in folder.tensors.values()),
        quantized_bytes=quantized_bytes,
        layers=_in_order(layers, list(solved)),
        dense=_dense(layouts, manifest),
        decoder_layers=tuple(_entries(manifest, "decoder_layers")),
        recipe=_recipe_name(manifest),
        made_by=_text(manifest.get("optgptq")),
        warnings=_texts(manifest.get("warnings")),
        kv_cache=cache_report(folder) if CACHE_KEY in folder.config else None,
        fp8_cache=fp8_summary(folder),
    )


def _in_order(layers: list[LayerReport], solved: list[str]) -> tuple[LayerReport, ...]:
    """Return the layers in the order they were solved in, by name where no manifest tells."""
    places = {name: place for place, name in enumerate(solved)}
    return tuple(sorted(layers, key=lambda layer: (places.get(layer.name, len(places)), _natural(layer.name))))


def _own_tensors(folder: CheckpointFolder, form: CheckpointFormat, layout: LinearLayout) -> list[TensorInfo]:
    names = [f"{layout.name}.{suffix}" for suffix in form.suffixes]
    return [folder.tensors[name] for name in names if name in folder.tensors]


def _layer(layout: LinearLayout, bits: int, stored_bits: int, solved: Mapping[str, Any]) -> LayerReport:
    return LayerReport(
        name=layout.name,
        out_features=layout.out_features,
        in_features=layout.in_features,
        bits=bits,
        group_size=layout.group_size,
        symmetric=layout.symmetric,
        coefficients=layout.coefficients,
        bits_per_weight=stored_bits / (layout.out_features * layout.in_features),
        loss=number(solved.get("loss")),
        rtn_loss=number(solved.get("rtn_loss")),
        damp_ratio_used=number(solved.get("damp_ratio_used")),
        notes=_texts(solved.get("notes")),
    )


def _dense(layouts: tuple[LinearLayout, ...], manifest: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    reasons = {str(entry.get("name")): str(entry.get("reason") or "") for entry in _entries(manifest, "dense")}
    for layout in layouts:
        if layout.bits is None:
            reasons.setdefault(layout.name, layout.dense_reason or "")
    return tuple({"name": name, "reason": reasons[name]} for name in sorted(reasons, key=_natural))


def _entries(manifest: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return a list of objects of the manifest; what is not an object is left out: anybody can edit that file."""
    entries = manifest.get(key)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _architecture(folder: CheckpointFolder) -> str:
    architectures = folder.config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def _recipe_name(manifest: Mapping[str, Any]) -> str:
    recipe = manifest.get("recipe")
    return str(recipe.get("name", "")) if isinstance(recipe, dict) else ""


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Return a sort key that puts decoder layer 2 before decoder layer 10."""
    return tuple((not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split("."))
