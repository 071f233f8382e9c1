"""Mean over positions of a second moment seen through the rotary embedding, in closed form.

The score of a query at position `l` and a key at `m` is `(R_l q)^T (R_m k)`. An error of the query projection is
rotated by `R_l` before it meets the keys, so the row factor of the query projection is the mean over `l` of
`R_l^T M R_l`, where `M` is the second moment of the rotated keys; the same holds for keys, roles exchanged.

Shapes: `K` heads, `D` head dimension, `S` positions, `R` rotated features (half as many pairs).
Source: BoA, arXiv 2406.13474, row factor with rotary embedding; closed form: docs/math/attention-moments.md.
"""

from __future__ import annotations

import torch

from optgptq.models.rope import rope_table
from optgptq.models.spec import RopeSpec


def average_over_positions(
    moment_KDD: torch.Tensor, rope: RopeSpec, num_positions: int, *, weight_KS: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean over positions `l < num_positions` of `R_l^T M R_l`, float64 `[K, D, D]` on the moment's device.

    The rotation is the half-split one of `rotate_in_place`, with the frequencies and the attention factor of
    `rope_table`; features beyond `rotary_dim` pass through. Nothing larger than the table `[S, R/2]` is built.

    Args:
        moment_KDD: symmetric or not.
        rope: table of the layer.
        num_positions: positions of a calibration window; they choose the frequencies of `dynamic` and `longrope`.
        weight_KS: weight of each position, `[S]` or one row per head, not negative; the result is the weighted sum
            over the sum of the weights. None: all positions count the same.
    """
    moment = moment_KDD.double()
    half = rope.rotary_dim // 2
    table = rope_table(rope, torch.arange(num_positions, device=moment.device), dtype=torch.float64)
    cosine, sine = table.cosine.reshape(num_positions, half), table.sine.reshape(num_positions, half)
    weight = _normalized(weight_KS, num_positions, moment.device)
    cos_cos, cos_sin, sin_sin = (
        torch.einsum("ks,sa,sb->kab", weight, left, right)
        for left, right in ((cosine, cosine), (cosine, sine), (sine, sine))
    )
    sin_cos = cos_sin.transpose(1, 2)
    first, second, rest = slice(0, half), slice(half, 2 * half), slice(2 * half, None)
    m11, m12, m21, m22 = (moment[:, rows, columns] for rows in (first, second) for columns in (first, second))
    result = moment.clone()
    result[:, first, first] = cos_cos * m11 + cos_sin * m12 + sin_cos * m21 + sin_sin * m22
    result[:, first, second] = -cos_sin * m11 + cos_cos * m12 - sin_sin * m21 + sin_cos * m22
    result[:, second, first] = -sin_cos * m11 - sin_sin * m12 + cos_cos * m21 + cos_sin * m22
    result[:, second, second] = sin_sin * m11 - sin_cos * m12 - cos_sin * m21 + cos_cos * m22
    # The pass-through features meet a single rotation, so only its mean enters.
    cos, sin = (weight @ part for part in (cosine, sine))
    for source, target in ((moment, result), (moment.mT, result.mT)):
        above, below = source[:, first, rest], source[:, second, rest]
        target[:, first, rest] = cos.unsqueeze(-1) * above + sin.unsqueeze(-1) * below
        target[:, second, rest] = cos.unsqueeze(-1) * below - sin.unsqueeze(-1) * above
    return result


def _normalized(weight_KS: torch.Tensor | None, num_positions: int, device: torch.device) -> torch.Tensor:
    if weight_KS is None:
        return torch.full((1, num_positions), 1 / num_positions, dtype=torch.float64, device=device)
    weight = weight_KS.reshape(-1, num_positions).to(device=device, dtype=torch.float64)
    return weight / weight.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
