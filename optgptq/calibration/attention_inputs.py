"""What attention reads in one decoder layer, for the collectors of attention moments.

Shapes: `B` windows of a batch, `S` positions, `M` model width, `N` query heads, `K` key/value heads,
`D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optgptq.models.attention import AttentionContext
from optgptq.models.layer import DecoderLayer


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AttentionInputs:
    """Heads of a batch, in the dtype of the activations.

    Attributes:
        query_BNSD, key_BKSD, value_BKSD: as attention uses them: normed and rotated.
        inputs_BSM: what the linears of the stage `qkv` read.
        raw_query_BNSD, raw_key_BKSD: the projections before the query and key norm; None where there is none.
    """

    query_BNSD: torch.Tensor
    key_BKSD: torch.Tensor
    value_BKSD: torch.Tensor
    inputs_BSM: torch.Tensor
    raw_query_BNSD: torch.Tensor | None = None
    raw_key_BKSD: torch.Tensor | None = None


def attention_inputs(layer: DecoderLayer, inputs_BSM: torch.Tensor, context: AttentionContext) -> AttentionInputs:
    """Return the heads that `layer` makes of `inputs_BSM`, its stage input of `qkv`."""
    query_BNSD, key_BKSD, value_BKSD = layer.project_heads(inputs_BSM, context)
    heads = AttentionInputs(query_BNSD=query_BNSD, key_BKSD=key_BKSD, value_BKSD=value_BKSD, inputs_BSM=inputs_BSM)
    if layer.norms.query is None or layer.norms.key is None:
        return heads
    raw_query_BNSD, raw_key_BKSD, _ = _without_norm_and_rotation(layer).project_heads(inputs_BSM, context)
    return replace(heads, raw_query_BNSD=raw_query_BNSD, raw_key_BKSD=raw_key_BKSD)


def _without_norm_and_rotation(layer: DecoderLayer) -> DecoderLayer:
    spec = replace(layer.spec, layers=tuple(replace(each, rope=None) for each in layer.spec.layers))
    return replace(layer, spec=spec, norms=replace(layer.norms, query=None, key=None))
