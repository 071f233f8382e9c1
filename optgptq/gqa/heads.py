"""The projections of one decoder layer by heads, whatever the layout of its linears, and back into linears.

Shapes: `N` query heads, `K` key/value heads, `D` head dimension, `I` input columns, `M` model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.calibration.head_rows import Projection, head_rows
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear
from optgptq.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeadWeights:
    """Weights and biases of attention, float64; a bias is None where the family stores none.

    Attributes:
        query_NDI, key_KDI, value_KDI: projections into heads.
        output_MND: projection of the heads' outputs.
        query_bias_ND, key_bias_KD, value_bias_KD, output_bias_M: biases.
    """

    query_NDI: torch.Tensor
    key_KDI: torch.Tensor
    value_KDI: torch.Tensor
    output_MND: torch.Tensor
    query_bias_ND: torch.Tensor | None = None
    key_bias_KD: torch.Tensor | None = None
    value_bias_KD: torch.Tensor | None = None
    output_bias_M: torch.Tensor | None = None


def read_heads(layer: DecoderLayer) -> HeadWeights:
    """Return the attention weights of a dense layer."""
    spec, rows = layer.spec, head_rows(layer.spec)
    (output_name,) = spec.stage("o").linears
    output = _dense(layer, output_name)

    def weight(projection: Projection) -> torch.Tensor:
        return _dense(layer, projection.linear).weight_OI.double()[projection.rows_ND]

    def bias(projection: Projection) -> torch.Tensor | None:
        bias_O = _dense(layer, projection.linear).bias_O
        return None if bias_O is None else bias_O.double()[projection.rows_ND]

    return HeadWeights(
        query_NDI=weight(rows.query),
        key_KDI=weight(rows.key),
        value_KDI=weight(rows.value),
        output_MND=output.weight_OI.double().view(-1, spec.num_heads, spec.head_dim),
        query_bias_ND=bias(rows.query),
        key_bias_KD=bias(rows.key),
        value_bias_KD=bias(rows.value),
        output_bias_M=None if output.bias_O is None else output.bias_O.double(),
    )


def write_heads(heads: HeadWeights, spec: DecoderSpec) -> dict[str, Linear]:
    """Return the linears of the stages `qkv` and `o` in the layout of `spec`, float64, by local name."""
    rows = head_rows(spec)
    parts = (
        (rows.query, heads.query_NDI, heads.query_bias_ND),
        (rows.key, heads.key_KDI, heads.key_bias_KD),
        (rows.value, heads.value_KDI, heads.value_bias_KD),
    )
    linears: dict[str, Linear] = {}
    for name in spec.stage("qkv").linears:
        own = [part for part in parts if part[0].linear == name]
        num_rows = sum(rows_of.rows_ND.numel() for rows_of, _, _ in own)
        weight_OI = heads.query_NDI.new_empty(num_rows, heads.query_NDI.shape[-1])
        bias_O = None if heads.query_bias_ND is None else weight_OI.new_empty(num_rows)
        for projection, weight_NDI, bias_ND in own:
            weight_OI[projection.rows_ND] = weight_NDI
            if bias_O is not None and bias_ND is not None:
                bias_O[projection.rows_ND] = bias_ND
        linears[name] = Linear(weight_OI, bias_O)
    (output_name,) = spec.stage("o").linears
    linears[output_name] = Linear(heads.output_MND.flatten(1), heads.output_bias_M)
    return linears


def _dense(layer: DecoderLayer, name: str) -> Linear:
    linear = layer.linears[name]
    if not isinstance(linear, Linear):
        raise TypeError(f"{name} is not dense")
    return linear
