"""Quantized linears of a checkpoint, decoded: for a whole model, or for one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import FormatError
from optgptq.formats import CheckpointFormat, detect
from optgptq.layout import LinearLayout
from optgptq.models.checks import read_weight
from optgptq.models.inventory import LinearInfo, head_linear, model_linears
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear, LinearLike
from optgptq.models.loading import SupplyLinear, load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.quantized_weight import QuantizedWeight


def decoded_layers(
    folder: CheckpointFolder, *, dtype: torch.dtype, device: torch.device
) -> Callable[[int], DecoderLayer]:
    """Return what reads decoder layer `index` of any readable checkpoint, its quantized linears decoded.

    Nothing is kept: a layer lives as long as the caller holds it. Same errors as `decoded_linears`.
    """
    spec, supply = model_spec(folder), decoded_linears(folder, dtype=dtype, device=device)

    def read(index: int) -> DecoderLayer:
        return load_layer(folder, spec, index, dtype=dtype, device=device, supply_linear=supply)

    return read


def decoded_linears(folder: CheckpointFolder, *, dtype: torch.dtype, device: torch.device) -> SupplyLinear:
    """Return what decodes a quantized linear of any readable checkpoint, the head included; None for dense ones.

    Raises:
        ModelError, FormatError: the checkpoint is damaged, or its model or layout is not implemented; so may reading.
    """
    spec, form = model_spec(folder), detect(folder)
    read_layouts = () if form is None else form.read_layouts(folder)
    layouts = {layout.name: layout for layout in read_layouts if layout.bits is not None}
    linears = known_linears(spec)
    require_known(folder, layouts, linears)

    def supply(name: str) -> LinearLike | None:
        if form is None or name not in layouts:
            return None
        weight = decode_linear(folder, form, layouts[name], linears[name])
        bias_O = read_bias(folder, linears[name], dtype=dtype, device=device)
        return Linear(weight.dequantize(dtype).to(device), bias_O)

    return supply


def known_linears(spec: DecoderSpec) -> dict[str, LinearInfo]:
    """Return every linear that may be quantized, by full name: those of the decoder layers, and the head."""
    return {linear.name: linear for linear in (*model_linears(spec), head_linear(spec))}


def require_known(folder: CheckpointFolder, layouts: dict[str, LinearLayout], linears: dict[str, LinearInfo]) -> None:
    """Raise FormatError where something is quantized that is neither a linear of a decoder layer nor the head."""
    unknown = sorted(layouts.keys() - linears.keys())
    if unknown:
        raise FormatError(
            f"{folder.path}: {unknown[0]}",
            expected="quantized linears inside decoder layers, and a quantized head",
            found=f"a quantized module that the model does not list among them ({len(unknown)} in all)",
            action="Use a checkpoint whose embedding is dense.",
        )


def decode_linear(
    folder: CheckpointFolder, form: CheckpointFormat, layout: LinearLayout, linear: LinearInfo
) -> QuantizedWeight:
    """Return one quantized weight; FormatError where its shape or its numbers cannot be those of the model."""
    weight = form.decode(folder, layout)
    where = f"{folder.path}: {layout.name}"
    if (weight.out_features, weight.in_features) != (linear.out_features, linear.in_features):
        raise FormatError(
            where,
            expected=f"shape {[linear.out_features, linear.in_features]}",
            found=f"{[weight.out_features, weight.in_features]}",
            action="Check that the weights belong to config.json.",
        )
    # Codes and orders are whole numbers; what is left are scales or coefficients.
    numbers = [part for part in weight.digest_parts() if part.is_floating_point()]
    bad = sum(int((~torch.isfinite(part)).sum()) for part in numbers)
    if bad:
        raise FormatError(
            where,
            expected="finite scales or coefficients",
            found=f"{bad} that are NaN or infinite",
            action="Quantize the model again; `optgptq verify` lists all problems of a checkpoint.",
        )
    return weight


def read_bias(
    folder: CheckpointFolder, linear: LinearInfo, *, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor | None:
    """Return the bias of a quantized linear, None where there is none."""
    name = f"{linear.name}.bias"
    # Some writers add a bias of zeros to every quantized linear, so the file decides and not the model's config.
    if name not in folder.tensors and not linear.has_bias:
        return None
    return read_weight(folder, name, (linear.out_features,), dtype=dtype, device=device)
