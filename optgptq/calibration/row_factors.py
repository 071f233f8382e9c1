"""Whether the row factors of queries and keys are worth using: by what the layer computes, and by what was measured.

Shapes: `N` heads, `K` key/value heads, `D` head dimension, `O` output rows and `I` columns of the output projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFactorQuality:
    """What a row factor of one head can do.

    Attributes:
        coupling: Frobenius norm off the diagonal over that on it. Where it is zero, the two-sided solver gives the
            codes of the one-sided one.
        rank: eigenvalues above the rounding noise of a float32 sum.
        size: head dimension, the full rank.
    """

    coupling: float
    rank: int
    size: int

    def one_sided_reason(self, *, smallest_coupling: float = 0.01, smallest_rank_share: float = 0.5) -> str | None:
        """Return why the head should be solved with one side only, as a plain clause; None where both are good."""
        if self.rank == 0:
            return "what the head is multiplied with is zero everywhere"
        if self.rank < smallest_rank_share * self.size:
            return f"its row factor has rank {self.rank} of {self.size}"
        if self.coupling < smallest_coupling:
            return f"its row factor is nearly diagonal (coupling {self.coupling:.2g})"
        return None


def row_factor_quality(moment_NDD: torch.Tensor) -> tuple[RowFactorQuality, ...]:
    """Return the quality of each head's row factor; `moment_NDD` is symmetric and finite."""
    moment = moment_NDD.double()
    size = moment.shape[-1]
    diagonal_ND = moment.diagonal(dim1=1, dim2=2)
    off_NDD = moment - torch.diag_embed(diagonal_ND)
    coupling_N = off_NDD.flatten(1).norm(dim=1) / diagonal_ND.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    values_ND = torch.linalg.eigvalsh(moment)
    noise_N = size * torch.finfo(torch.float32).eps * values_ND[:, -1].clamp_min(0)
    ranks_N = (values_ND > noise_N.unsqueeze(1)).sum(dim=1)
    return tuple(
        RowFactorQuality(coupling=float(coupling), rank=int(rank), size=size)
        for coupling, rank in zip(coupling_N, ranks_N, strict=True)
    )


def two_sided_reason(spec: DecoderSpec, layer_index: int, num_positions: int) -> str | None:
    """Return why the pooled row factors of a layer must not be used, as a plain sentence; None where they may be.

    They count every pair of a query and a key. A sliding window of half the calibration window still sees
    three quarters of the causal pairs; a shorter one would be described by pairs that it never sees.
    The value moment and the factors of `SoftmaxRowMoments` follow the window exactly and are never excluded for it.
    """
    layer = spec.layers[layer_index]
    if layer.sliding_window is not None and 2 * layer.sliding_window < num_positions:
        return (
            f"decoder layer {layer_index} sees {layer.sliding_window} keys, fewer than half of the {num_positions} "
            "positions of a calibration window"
        )
    if spec.names.query_norm is not None and spec.norm.kind != "rms":
        return f"the query and key norms of decoder layer {layer_index} subtract a mean"
    return None


def value_output_moments(output_weight_OI: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    """Return the row factor of each value head's projection, float64 `[K, D, D]`: `W_O^T W_O` of its query heads.

    `output_weight_OI` is the weight of the stage `o`, query heads along its columns. With one query head to a value
    head it is exact beside the head's own input moment; for a group it is the mean, without products across heads.
    """
    columns_OND = output_weight_OI.double().reshape(-1, spec.num_heads, spec.head_dim)
    moment_NDD = torch.einsum("ond,one->nde", columns_OND, columns_OND)
    return moment_NDD.reshape(spec.num_kv_heads, -1, spec.head_dim, spec.head_dim).mean(dim=1)
