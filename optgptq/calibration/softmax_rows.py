"""Row factors that follow the softmax: how an error of a score really reaches the output of attention.

The pooled factors of `AttentionMoments` count every pair of a query and a key alike, seen or not. Here, at position `l`
with weights `a` and output `o = sum_m a_m v_m`,

    J_l = scale * sum_m a_m c_m (v_m - o) k_m^T

is the derivative of the output by the rotated query (`c` is the slope of a soft cap, else 1), and the factor of the
query projection is the mean over drawn positions of `R_l^T J_l^T C J_l R_l`, `C = W_O^T W_O` of the head. An error at
key `m` moves the output by `scale * a_m c_m (v_m - o) (R_m^T q_l)^T`. Errors at different keys are taken to be
unrelated: the factor of the key projection is the sum over pairs of
`(scale a_m c_m)^2 (v_m - o)^T C (v_m - o) R_m^T q_l q_l^T R_m`. Query and key norms enter with their derivative.
Mask, sliding window and ALiBi are those of the weights.

Shapes: `B` windows of a batch, `S` drawn positions, `T` positions of a window, `N` query heads, `K` key/value heads,
`G` query heads of one key/value head, `D` head dimension, `O` output rows of the output projection, `I` its columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.calibration.attention_inputs import AttentionInputs
from optgptq.calibration.attention_map import attention_weights
from optgptq.calibration.normed_heads import through_norm
from optgptq.calibration.positions import drawn_positions, window_generator, window_lengths
from optgptq.models.layer import DecoderLayer
from optgptq.models.rope import RopeTable, rope_table, rotate_in_place
from optgptq.models.spec import DecoderSpec
from optgptq.numerics import exact_float32_products

# Numbers `S * T * D` of one intermediate: 8 MiB in float32.
_NUMBERS_PER_CHUNK = 2 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxRowSettings:
    """How row factors are collected.

    Attributes:
        positions_per_window: query positions that are drawn from every window. Each gives a matrix of full rank, so
            that few are needed.
        seed: of the drawn positions, which depend on the window's index only.
        dtype: accumulator and intermediates, float32 or float64.
    """

    positions_per_window: int = 8
    seed: int = 0
    dtype: torch.dtype = torch.float32


class SoftmaxRowMoments:
    """Collector of one decoder layer: plain sums, as those of `AttentionMoments`.

    Attributes:
        num_tokens: query positions that were drawn.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        settings: SoftmaxRowSettings,
        *,
        output_weight_OI: torch.Tensor | None,
        num_positions: int,
    ) -> None:
        """`output_weight_OI` is the weight of the stage `o`; None prices the output of the heads themselves."""
        spec, size, dtype = layer.spec, layer.spec.head_dim, settings.dtype
        self.settings = settings
        self.num_tokens = 0
        self._layer = layer
        device = None if output_weight_OI is None else output_weight_OI.device
        self._roots_NDD = _output_roots(output_weight_OI, layer).to(dtype)
        rope = spec.layers[layer.index].rope
        every_position = torch.arange(num_positions, device=device)
        self._table = None if rope is None else rope_table(rope, every_position, dtype=dtype)
        self._query_sum_NDD = torch.zeros(spec.num_heads, size, size, dtype=dtype, device=device)
        self._key_sum_KDD = torch.zeros(spec.num_kv_heads, size, size, dtype=dtype, device=device)

    def add(self, inputs: AttentionInputs, valid_BS: torch.Tensor | None = None, *, first_window: int = 0) -> None:
        """Add a batch of windows; `valid_BS` and `first_window` as in `AttentionMoments.add`."""
        spec, settings = self._layer.spec, self.settings
        for row, length in enumerate(window_lengths(valid_BS, inputs.inputs_BSM)):
            if not length:
                continue
            number = min(settings.positions_per_window, length)
            positions_S = drawn_positions(length, number, window_generator(settings.seed, first_window + row))
            self.num_tokens += number
            chunk = max(1, _NUMBERS_PER_CHUNK // (length * spec.head_dim))
            for chunk_S in torch.split(positions_S.to(inputs.query_BNSD.device), chunk):
                for head in range(spec.num_heads):
                    with exact_float32_products():
                        self._add_head(inputs, row, head, chunk_S)

    def merge(self, other: SoftmaxRowMoments) -> None:
        """Add what another part of the calibration set measured."""
        self._query_sum_NDD += other._query_sum_NDD.to(self._query_sum_NDD.device)
        self._key_sum_KDD += other._key_sum_KDD.to(self._key_sum_KDD.device)
        self.num_tokens += other.num_tokens

    def is_finite(self) -> bool:
        """False as soon as something that was added is not finite."""
        return bool(torch.isfinite(self._query_sum_NDD).all()) and bool(torch.isfinite(self._key_sum_KDD).all())

    def query_output_moments(self) -> torch.Tensor:
        """Return the row factor of each query head's projection, float64 `[N, D, D]`, symmetric."""
        moment_NDD = self._query_sum_NDD.double() / max(self.num_tokens, 1)
        return (moment_NDD + moment_NDD.mT) / 2

    def key_output_moments(self) -> torch.Tensor:
        """Return the row factor of each key head's projection, float64 `[K, D, D]`, summed over its query heads."""
        moment_KDD = self._key_sum_KDD.double() / max(self.num_tokens, 1)
        return (moment_KDD + moment_KDD.mT) / 2

    def _add_head(self, inputs: AttentionInputs, row: int, head: int, positions_S: torch.Tensor) -> None:
        spec, norms, dtype = self._layer.spec, self._layer.norms, self.settings.dtype
        scale = spec.layers[self._layer.index].attention_scale
        kv_head, length = head // (spec.num_heads // spec.num_kv_heads), int(positions_S[-1]) + 1
        query_SD = inputs.query_BNSD[row, head, positions_S].to(dtype)
        key_TD = inputs.key_BKSD[row, kv_head, :length].to(dtype)
        value_TD = inputs.value_BKSD[row, kv_head, :length].to(dtype) @ self._roots_NDD[head].T
        weights_ST, slopes_ST = self._weights(query_SD, key_TD, positions_S, head)
        moved_STD = weights_ST.unsqueeze(-1) * (value_TD - (weights_ST @ value_TD).unsqueeze(1))
        moved_STD *= scale * slopes_ST.unsqueeze(-1)

        derivative_DSD = (moved_STD.mT @ key_TD).transpose(0, 1)
        rows_DSD = self._turned_back(derivative_DSD, positions_S)
        if norms.query is not None and inputs.raw_query_BNSD is not None:
            rows_DSD = through_norm(rows_DSD, inputs.raw_query_BNSD[row, head, positions_S].to(dtype), norms.query)
        rows_RD = rows_DSD.reshape(-1, spec.head_dim)
        self._query_sum_NDD[head].addmm_(rows_RD.T, rows_RD)

        every_position = torch.arange(length, device=query_SD.device)
        seen_STD = query_SD.unsqueeze(1) * moved_STD.norm(dim=-1, keepdim=True)
        rows_STD = self._turned_back(seen_STD, every_position)
        if norms.key is not None and inputs.raw_key_BKSD is not None:
            rows_STD = through_norm(rows_STD, inputs.raw_key_BKSD[row, kv_head, :length].to(dtype), norms.key)
        rows_RD = rows_STD.reshape(-1, spec.head_dim)
        self._key_sum_KDD[kv_head].addmm_(rows_RD.T, rows_RD)

    def _weights(
        self, query_SD: torch.Tensor, key_TD: torch.Tensor, positions_S: torch.Tensor, head: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights `[S, T]` and the slopes of the soft cap, which broadcast to them."""
        spec, index = self._layer.spec, self._layer.index
        weights_GST = attention_weights(
            query_SD.unsqueeze(0), key_TD, positions_S, spec=spec, layer_index=index, first_head=head
        )
        if spec.attention_softcap is None:
            return weights_GST[0].to(query_SD.dtype), torch.ones_like(query_SD[:1, :1])
        scores_ST = query_SD @ key_TD.T * (spec.layers[index].attention_scale / spec.attention_softcap)
        return weights_GST[0].to(query_SD.dtype), 1 - scores_ST.tanh_().square_()

    def _turned_back(self, vectors_BSD: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
        """Return `R^T v`, each vector by the rotation of its position."""
        turned_BSD = vectors_BSD.clone(memory_format=torch.contiguous_format)
        if self._table is not None:
            cosine, sine = (each[positions_S].squeeze(1) for each in (self._table.cosine, self._table.sine))
            rotate_in_place(turned_BSD, RopeTable(cosine=cosine, sine=-sine))
        return turned_BSD


def softmax_row_bytes(spec: DecoderSpec, settings: SoftmaxRowSettings, *, num_positions: int) -> int:
    """Return the most memory that sums and intermediates of `SoftmaxRowMoments` take, its inputs not counted."""
    heads, size = 2 * spec.num_heads + spec.num_kv_heads, spec.head_dim
    numbers = max(_NUMBERS_PER_CHUNK, num_positions * size)
    return (heads * size**2 + 6 * numbers + num_positions * size) * settings.dtype.itemsize


def _output_roots(output_weight_OI: torch.Tensor | None, layer: DecoderLayer) -> torch.Tensor:
    """Return per query head a float64 matrix `[D, D]` whose Gram matrix is that of the head's columns of `W_O`."""
    size, number = layer.spec.head_dim, layer.spec.num_heads
    if output_weight_OI is None:
        return torch.eye(size, dtype=torch.float64).expand(number, size, size)
    columns_NOD = output_weight_OI.double().reshape(-1, number, size).transpose(0, 1)
    values_ND, vectors_NDD = torch.linalg.eigh(columns_NOD.mT @ columns_NOD)
    roots_NDD: torch.Tensor = values_ND.clamp_min(0).sqrt().unsqueeze(-1) * vectors_NDD.mT
    return roots_NDD
