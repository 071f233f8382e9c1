"""What is done to queries, keys, values and outputs around a quantized cache; scores and outputs stay what they were.

With `y = ((x - shift) / scale) @ rotation` stored, a query becomes `(q * scale) @ rotation`: then `q' y` is
`q (x - shift)`, and the part of the shift is the same for all keys of a query. Computed in float32, given back in the
dtype that came.

Shapes: `T` tokens, `N` query heads, `K` key/value heads, `G` queries of one, `D` head dimension, `R` rows of a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.kv_cache.setup import LayerParameters, SideParameters


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeadTransform:
    """The run-time part of one decoder layer's parameters."""

    keys: SideParameters
    values: SideParameters

    @classmethod
    def of(cls, parameters: LayerParameters) -> HeadTransform:
        """Return the transform of a layer."""
        return cls(keys=parameters.keys, values=parameters.values)

    def query(self, query_TND: torch.Tensor) -> torch.Tensor:
        """Return queries for transformed keys."""
        scale_KD, rotation_KDD = self.keys.scale_KD, self.keys.rotation_KDD
        if scale_KD is None and rotation_KDD is None:
            return query_TND
        num_tokens, num_heads, head_dim = query_TND.shape
        num_kv_heads = _num_heads(self.keys)
        query_TKGD = query_TND.float().view(num_tokens, num_kv_heads, -1, head_dim)
        if scale_KD is not None:
            query_TKGD = query_TKGD * scale_KD.unsqueeze(1)
        if rotation_KDD is not None:
            query_TKGD = _rotated(query_TKGD, rotation_KDD)
        return query_TKGD.reshape(num_tokens, num_heads, head_dim).to(query_TND.dtype)

    def key(self, key_TKD: torch.Tensor) -> torch.Tensor:
        """Return keys as they are stored."""
        return transform_vectors(key_TKD, self.keys)

    def value(self, value_TKD: torch.Tensor) -> torch.Tensor:
        """Return values as they are stored."""
        return transform_vectors(value_TKD, self.values)

    def output(self, output_TND: torch.Tensor) -> torch.Tensor:
        """Return attention of the values that there were, from attention of those stored."""
        side = self.values
        if side.shift_KD is None and side.scale_KD is None and side.rotation_KDD is None:
            return output_TND
        num_tokens, num_heads, head_dim = output_TND.shape
        output_TKGD = output_TND.float().view(num_tokens, _num_heads(side), -1, head_dim)
        if side.rotation_KDD is not None:
            output_TKGD = _rotated(output_TKGD, side.rotation_KDD.transpose(1, 2))
        if side.scale_KD is not None:
            output_TKGD = output_TKGD * side.scale_KD.unsqueeze(1)
        if side.shift_KD is not None:
            output_TKGD = output_TKGD + side.shift_KD.unsqueeze(1)
        return output_TKGD.reshape(num_tokens, num_heads, head_dim).to(output_TND.dtype)


def transform_vectors(x_TKD: torch.Tensor, side: SideParameters) -> torch.Tensor:
    """Return vectors as they are stored, in their own dtype."""
    if side.shift_KD is None and side.scale_KD is None and side.rotation_KDD is None:
        return x_TKD
    y_TKD = x_TKD.float()
    if side.shift_KD is not None:
        y_TKD = y_TKD - side.shift_KD
    if side.scale_KD is not None:
        y_TKD = y_TKD / side.scale_KD
    if side.rotation_KDD is not None:
        y_TKD = _rotated(y_TKD.unsqueeze(2), side.rotation_KDD).squeeze(2)
    return y_TKD.to(x_TKD.dtype)


def _rotated(x_TKGD: torch.Tensor, rotation_KDD: torch.Tensor) -> torch.Tensor:
    """Return `x @ rotation` as one product for each head; a product for each token would copy the rotation as often."""
    num_tokens, num_kv_heads, group, head_dim = x_TKGD.shape
    rows_KRD = x_TKGD.transpose(0, 1).reshape(num_kv_heads, num_tokens * group, head_dim)
    rotated_KRD = torch.bmm(rows_KRD, rotation_KDD)
    return rotated_KRD.view(num_kv_heads, num_tokens, group, head_dim).transpose(0, 1)


def _num_heads(side: SideParameters) -> int:
    known = next(part for part in (side.scale_KD, side.rotation_KDD, side.shift_KD) if part is not None)
    return known.shape[0]
