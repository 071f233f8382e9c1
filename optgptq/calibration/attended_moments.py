"""Second moments of attention-averaged inputs: what the value projection of a key/value head is multiplied with.

The output of query head `h` is `A_h X W_V^T`, so an error of `W_V` reaches it through `Y_h = A_h X`, and the moment of
the value projection is the sum of `Y_h^T Y_h` over the query heads of the group. Nothing is approximated before `W_O`.

Shapes: `G` query heads of one key/value head, `S` query positions that count, `T` positions of a window, `N` query
heads, `K` key/value heads, `D` head dimension, `I` input columns, `R` rows of attended inputs.
Source: aespa, arXiv 2402.08958, eq. 18; BoA, arXiv 2406.13474, for groups of heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.calibration.attention_map import attention_weights, check_causal
from optgptq.calibration.moments import InputMoment
from optgptq.models.spec import DecoderSpec
from optgptq.numerics import exact_float32_products

# Rows of attention maps that exist at a time, and the most positions among them: few enough to skip later keys.
_ROWS_PER_CHUNK = 1024
_POSITIONS_PER_CHUNK = 256
# Only blocks on and above the diagonal of a symmetric product are multiplied.
_COLUMNS_PER_BLOCK = 256


@dataclass(frozen=True, slots=True, eq=False)
class WindowHeads:
    """One window of one stream, padding cut off: `query_NTD`, `key_KTD`, `inputs_TI`."""

    query_NTD: torch.Tensor
    key_KTD: torch.Tensor
    inputs_TI: torch.Tensor


class AttendedMoments:
    """Sums of `y y^T` per key/value head, and of `(y_reference - y) y^T` where a second stream is followed.

    `y` is the attended input of one query head at one position. Rows are counted; means are over rows.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        layer_index: int,
        kv_heads: range,
        *,
        dtype: torch.dtype,
        shift: bool,
        device: torch.device | str,
    ) -> None:
        self.kv_heads = kv_heads
        self.moments = [InputMoment(spec.hidden_size, dtype=dtype, device=device) for _ in kv_heads]
        shape = (len(kv_heads) if shift else 0, spec.hidden_size, spec.hidden_size)
        self.shift_sum_KII = torch.zeros(shape, dtype=dtype, device=device)
        self._spec = spec
        self._layer_index = layer_index
        self._checked = False

    @property
    def num_rows(self) -> int:
        """Rows that were added for each key/value head."""
        return self.moments[0].num_tokens if self.moments else 0

    def add(self, window: WindowHeads, positions_S: torch.Tensor, *, reference: WindowHeads | None = None) -> None:
        """Add the rows of `positions_S` (int64, ascending); `reference` is the same window in the other stream.

        Raises:
            NumericalError: the attention weights are not those of a causal softmax.
        """
        if (reference is not None) != bool(self.shift_sum_KII.shape[0]):
            raise ValueError("a reference stream is needed with shift, and only then")
        group = self._spec.num_heads // self._spec.num_kv_heads
        num_rows, (length, width) = group * len(positions_S), window.inputs_TI.shape
        add_head = self._add_gram if _gram_is_cheaper(num_rows, length, width) else self._add_rows
        for slot, kv_head in enumerate(self.kv_heads):
            with exact_float32_products():
                add_head(slot, kv_head, window, positions_S, reference)

    def merge(self, other: AttendedMoments) -> None:
        """Add what another part of the calibration set measured for the same heads."""
        for mine, theirs in zip(self.moments, other.moments, strict=True):
            mine.merge(theirs)
        self.shift_sum_KII += other.shift_sum_KII.to(self.shift_sum_KII.device)

    def is_finite(self) -> bool:
        """False as soon as a sum is not finite."""
        shift = self.shift_sum_KII.diagonal(dim1=1, dim2=2)
        return all(moment.is_finite() for moment in self.moments) and bool(torch.isfinite(shift).all())

    def shift_mean(self, kv_head: int) -> torch.Tensor:
        """Return the mean `[I, I]` of `(y_reference - y) y^T`."""
        return self.shift_sum_KII[self.kv_heads.index(kv_head)] / max(self.num_rows, 1)

    def _add_rows(
        self, slot: int, kv_head: int, window: WindowHeads, positions_S: torch.Tensor, reference: WindowHeads | None
    ) -> None:
        for chunk_S in torch.split(positions_S, self._chunk_size()):
            attended_RI = self._attended(kv_head, window, chunk_S)
            self.moments[slot].add(attended_RI)
            if reference is not None:
                sum_II = self.shift_sum_KII[slot]
                change_RI = self._attended(kv_head, reference, chunk_S).to(sum_II.dtype) - attended_RI
                sum_II.addmm_(change_RI.T, attended_RI.to(sum_II.dtype))

    def _attended(self, kv_head: int, window: WindowHeads, chunk_S: torch.Tensor) -> torch.Tensor:
        weights_GST = self._weights(kv_head, window, chunk_S)
        inputs_TI = window.inputs_TI[: weights_GST.shape[-1]]
        # Products of bfloat16 activations stay in bfloat16: rounding a weight moves the moment by 1e-6 of its diagonal.
        return weights_GST.flatten(0, 1).to(inputs_TI.dtype) @ inputs_TI

    def _add_gram(
        self, slot: int, kv_head: int, window: WindowHeads, positions_S: torch.Tensor, reference: WindowHeads | None
    ) -> None:
        """Add `X^T (sum A^T A) X`: one product of the width for all query heads of the group."""
        moment = self.moments[slot]
        dtype = moment.sum_II.dtype
        inputs_TI = window.inputs_TI.to(dtype)
        length = inputs_TI.shape[0]
        gram_TT, cross_TT = (torch.zeros(length, length, dtype=dtype, device=inputs_TI.device) for _ in range(2))
        for chunk_S in torch.split(positions_S, self._chunk_size()):
            weights_RT = self._weights(kv_head, window, chunk_S).flatten(0, 1).to(dtype)
            seen = weights_RT.shape[1]
            gram_TT[:seen, :seen].addmm_(weights_RT.T, weights_RT)
            if reference is not None:
                other_RT = self._weights(kv_head, reference, chunk_S).flatten(0, 1).to(dtype)
                cross_TT[:seen, :seen].addmm_(other_RT.T, weights_RT)
        product_TI = gram_TT @ inputs_TI
        _add_upper(moment.sum_II, inputs_TI, product_TI)
        moment.num_tokens += positions_S.shape[0] * (self._spec.num_heads // self._spec.num_kv_heads)
        if reference is not None:
            self.shift_sum_KII[slot].addmm_(inputs_TI.T, product_TI, alpha=-1)
            self.shift_sum_KII[slot].addmm_(reference.inputs_TI.to(dtype).T, cross_TT @ inputs_TI)

    def _weights(self, kv_head: int, window: WindowHeads, chunk_S: torch.Tensor) -> torch.Tensor:
        group = self._spec.num_heads // self._spec.num_kv_heads
        first_head = kv_head * group
        weights_GST = attention_weights(
            window.query_NTD[first_head : first_head + group, chunk_S],
            window.key_KTD[kv_head, : int(chunk_S[-1]) + 1],
            chunk_S,
            spec=self._spec,
            layer_index=self._layer_index,
            first_head=first_head,
        )
        if not self._checked:
            check_causal(weights_GST, chunk_S, where=f"attention of decoder layer {self._layer_index}")
            self._checked = True
        return weights_GST

    def _chunk_size(self) -> int:
        group = self._spec.num_heads // self._spec.num_kv_heads
        return max(1, min(_POSITIONS_PER_CHUNK, _ROWS_PER_CHUNK // group))


def attended_bytes(spec: DecoderSpec, num_positions: int, *, num_kv_heads: int, dtype: torch.dtype, shift: bool) -> int:
    """Return the most memory that sums and intermediates of `AttendedMoments` take, its inputs not counted."""
    width, number = spec.hidden_size, dtype.itemsize
    sums = num_kv_heads * width**2 * number * (2 if shift else 1)
    # Scores, mask, softmax and a copy in another dtype; rows of both streams and their difference.
    maps = 4 * _ROWS_PER_CHUNK * num_positions * 8
    rows = 4 * _ROWS_PER_CHUNK * width * number
    gram = 2 * num_positions**2 * number + 4 * num_positions * width * number
    return sums + maps + max(rows, gram)


def _gram_is_cheaper(num_rows: int, length: int, width: int) -> bool:
    by_rows = num_rows * width * (length + width)
    by_gram = length * (num_rows * length + width * (length + width))
    return by_gram < by_rows


def _add_upper(sum_II: torch.Tensor, left_TI: torch.Tensor, right_TI: torch.Tensor) -> None:
    """Add `left^T right`, which is symmetric, on and above the diagonal of `sum_II`."""
    for begin in range(0, sum_II.shape[0], _COLUMNS_PER_BLOCK):
        end = begin + _COLUMNS_PER_BLOCK
        sum_II[begin:end, begin:].addmm_(left_TI[:, begin:end].T, right_TI[:, begin:])
