"""Row factors through a query or key norm: the norm's first-order change at sampled tokens.

With `u = W x`, `rho = sqrt(mean(u^2) + eps)` and `v = u / rho`, the normed head is `gamma * v` and its derivative
`J = diag(gamma) (I - v v^T / D) / rho`. At position `l` the row factor of `W` is the mean over tokens of
`J^T R_l^T M R_l J`. It is summed exactly over the sampled tokens, at `D^2` operations a token, as
`G M_l G / rho^2 - (v z^T + z v^T) / (D rho^2) + v v^T (v . z) / (D rho)^2` with `G = diag(gamma)`, `M_l = R_l^T M R_l`,
`z = G M_l G v`; the first term is a weighted mean over positions in closed form.

Shapes: `T` tokens, `N` heads, `D` head dimension, `S` positions.
"""

from __future__ import annotations

import torch

from optgptq.calibration.rope_average import average_over_positions
from optgptq.models.norm import Norm
from optgptq.models.rope import RopeTable, rope_table, rotate_in_place
from optgptq.models.spec import RopeSpec


class NormedHeads:
    """Heads before their norm at a sample of tokens: parts of the calibration set merge by joining their samples."""

    def __init__(self, norm: Norm, rope: RopeSpec | None, *, num_positions: int) -> None:
        self._norm = norm
        self._rope = rope
        self._num_positions = num_positions
        self._raw_TND: list[torch.Tensor] = []
        self._positions_T: list[torch.Tensor] = []

    @property
    def num_tokens(self) -> int:
        """Tokens in the sample."""
        return sum(positions.shape[0] for positions in self._positions_T)

    def add(self, raw_TND: torch.Tensor, positions_T: torch.Tensor) -> None:
        """Add tokens; both are copied."""
        self._raw_TND.append(raw_TND.clone())
        self._positions_T.append(positions_T.clone())

    def merge(self, other: NormedHeads) -> None:
        """Add the sample of another part of the calibration set."""
        self._raw_TND += other._raw_TND
        self._positions_T += other._positions_T

    def is_finite(self) -> bool:
        """False as soon as a projection is not finite."""
        return all(bool(torch.isfinite(raw).all()) for raw in self._raw_TND)

    def row_factor(self, moment_NDD: torch.Tensor) -> torch.Tensor:
        """Return the mean over the sample of `J^T R^T M R J`, float64 `[N, D, D]`; zero where the sample is empty.

        `moment_NDD` is the second moment of what the rotated heads are multiplied with, symmetric.
        """
        if not self.num_tokens:
            return torch.zeros_like(moment_NDD, dtype=torch.float64)
        device = moment_NDD.device
        raw_TND = torch.cat([raw.to(device) for raw in self._raw_TND]).double()
        positions_T = torch.cat([positions.to(device) for positions in self._positions_T])
        moment = moment_NDD.double()
        inverse_square_TN = 1 / (raw_TND.square().mean(dim=-1) + self._norm.spec.eps)
        unit_TND = raw_TND * inverse_square_TN.sqrt().unsqueeze(-1)
        gamma_D = torch.ones(raw_TND.shape[-1], dtype=torch.float64, device=device)
        if self._norm.weight is not None:
            gamma_D = self._norm.weight.to(device).double()
        answer_TND = gamma_D * self._turned_product(moment, gamma_D * unit_TND, positions_T)
        size = raw_TND.shape[-1]
        weighted_TND = unit_TND * inverse_square_TN.unsqueeze(-1)
        cross_NDD = torch.einsum("tnd,tne->nde", weighted_TND, answer_TND) / size
        energy_TN = (unit_TND * answer_TND).sum(dim=-1)
        square_NDD = torch.einsum("tnd,tne->nde", weighted_TND * energy_TN.unsqueeze(-1), unit_TND) / size**2
        plain_NDD = gamma_D.unsqueeze(-1) * self._plain(moment, inverse_square_TN, positions_T) * gamma_D
        result_NDD = (plain_NDD - cross_NDD - cross_NDD.mT + square_NDD) / raw_TND.shape[0]
        return (result_NDD + result_NDD.mT) / 2

    def _plain(self, moment_NDD: torch.Tensor, weight_TN: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Return the sum over tokens of `weight R^T M R`."""
        total_N = weight_TN.sum(dim=0)
        if self._rope is not None:
            weight_NS = torch.zeros(weight_TN.shape[1], self._num_positions, dtype=torch.float64, device=total_N.device)
            weight_NS.index_add_(1, positions_T, weight_TN.T)
            moment_NDD = average_over_positions(moment_NDD, self._rope, self._num_positions, weight_KS=weight_NS)
        return moment_NDD * total_N[:, None, None]

    def _turned_product(
        self, moment_NDD: torch.Tensor, heads_TND: torch.Tensor, positions_T: torch.Tensor
    ) -> torch.Tensor:
        """Return `R^T M R` times each head."""
        if self._rope is None:
            return torch.einsum("nde,tne->tnd", moment_NDD, heads_TND)
        every_position = torch.arange(self._num_positions, device=heads_TND.device)
        whole = rope_table(self._rope, every_position, dtype=torch.float64)
        table = RopeTable(cosine=whole.cosine[positions_T], sine=whole.sine[positions_T])
        turned_TND = heads_TND.clone()
        rotate_in_place(turned_TND, table)
        product_TND = torch.einsum("nde,tne->tnd", moment_NDD, turned_TND)
        # The transpose of a rotation is the rotation back, whatever factor is on cosine and sine.
        rotate_in_place(product_TND, RopeTable(cosine=table.cosine, sine=-table.sine))
        return product_TND


def through_norm(rows_BTD: torch.Tensor, raw_TD: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Return `rows J`, where `J` is the derivative of an RMS norm at each token `raw_TD`, in the dtype of the rows."""
    rows_BTD = rows_BTD if norm.weight is None else rows_BTD * norm.weight.to(rows_BTD)
    inverse_T1 = (raw_TD.square().mean(dim=-1, keepdim=True) + norm.spec.eps).rsqrt()
    unit_TD = raw_TD * inverse_T1
    along_BT1 = (rows_BTD * unit_TD).mean(dim=-1, keepdim=True)
    return (rows_BTD - along_BT1 * unit_TD) * inverse_T1
