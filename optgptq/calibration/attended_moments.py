"""Second moments of attention-averaged inputs: what the value projection of a key/value head is multiplied with.

The output of query head `h` is `A_h X W_V^T`, so an error of `W_V` reaches it through `Y_h = A_h X`, and the moment of
the value projection is the sum of `Y_h^T Y_h` over the query heads of the group. Nothing is approximated before `W_O`.

Shapes: `B` windows of one length, `G` query heads of one key/value head, `S` query positions that count, `T` positions
of a window, `N` query heads, `K` key/value heads, `D` head dimension, `I` input columns, `R` rows of attended inputs.
Source: aespa, arXiv 2402.08958, eq. 18; BoA, arXiv 2406.13474, for groups of heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.calibration.attention_map import attention_weights, check_causal
from optgptq.calibration.moments import InputMoment, add_sum
from optgptq.models.spec import DecoderSpec
from optgptq.native.causal_attention import attends_causally, causal_attention
from optgptq.numerics import exact_float32_products

# Windows that are added at a time: a chunk has at least one position of each.
MOST_WINDOWS = 16
# Rows of attention maps that exist at a time, and the most positions among them: few enough to skip later keys.
_ROWS_PER_CHUNK = 512
_POSITIONS_PER_CHUNK = 256
# Numbers of attended inputs that compiled attention makes at a time, but for rows of at least one chunk.
_FUSED_NUMBERS = 1 << 20
# Only blocks on and above the diagonal of a symmetric product are multiplied.
_COLUMNS_PER_BLOCK = 256


@dataclass(frozen=True, slots=True, eq=False)
class WindowHeads:
    """Windows of one length of one stream, padding cut off: `query_BNTD`, `key_BKTD`, `inputs_BTI`."""

    query_BNTD: torch.Tensor
    key_BKTD: torch.Tensor
    inputs_BTI: torch.Tensor

    def part(self, windows: slice) -> WindowHeads:
        """Return some of the windows."""
        return WindowHeads(self.query_BNTD[windows], self.key_BKTD[windows], self.inputs_BTI[windows])

    def of_kv_head(self, kv_head: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries `[B, G, T, D]`, keys `[B, 1, T, D]` and, as values, the inputs `[B, 1, T, I]` of one head."""
        query_BGTD = self.query_BNTD[:, kv_head * group : (kv_head + 1) * group]
        return query_BGTD, self.key_BKTD[:, kv_head : kv_head + 1], self.inputs_BTI.unsqueeze(1)


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

    def add(self, windows: WindowHeads, positions_BS: torch.Tensor, *, reference: WindowHeads | None = None) -> None:
        """Add the rows of `positions_BS` (int64, ascending); `reference` is the same windows in the other stream.

        Raises:
            NumericalError: the attention weights are not those of a causal softmax.
        """
        if (reference is not None) != bool(self.shift_sum_KII.shape[0]):
            raise ValueError("a reference stream is needed with shift, and only then")
        num_windows, length, width = windows.inputs_BTI.shape
        rows = self._group * positions_BS.shape[1]
        fused = attends_in_one_call(windows, self._spec, self._layer_index)
        by_gram = not fused and _gram_is_cheaper(rows, length, width)
        together = max(1, _fused_rows(width) // rows) if fused else 1 if by_gram else num_windows
        add = self._add_gram if by_gram else self._add_rows
        with exact_float32_products():
            for first in range(0, num_windows, together):
                part = slice(first, first + together)
                add(windows.part(part), positions_BS[part], None if reference is None else reference.part(part))

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

    @property
    def _group(self) -> int:
        return self._spec.num_heads // self._spec.num_kv_heads

    def _add_rows(self, windows: WindowHeads, positions_BS: torch.Tensor, reference: WindowHeads | None) -> None:
        attended, size = self._attended, self._chunk_size(len(positions_BS))
        if attends_in_one_call(windows, self._spec, self._layer_index):
            attended, size = self._fused, _fused_rows(windows.inputs_BTI.shape[2]) // (self._group * len(positions_BS))
        for chunk_BS in torch.split(positions_BS, max(1, size), dim=1):
            for slot, kv_head in enumerate(self.kv_heads):
                attended_RI = attended(kv_head, windows, chunk_BS)
                self.moments[slot].add(attended_RI)
                if reference is not None:
                    change_RI = attended(kv_head, reference, chunk_BS) - attended_RI
                    add_sum(change_RI, attended_RI, self.shift_sum_KII[slot])

    def _attended(self, kv_head: int, windows: WindowHeads, chunk_BS: torch.Tensor) -> torch.Tensor:
        weights_BGST = self._weights(kv_head, windows, chunk_BS)
        inputs_BTI = windows.inputs_BTI[:, : weights_BGST.shape[-1]]
        # Products of bfloat16 activations stay in bfloat16: rounding a weight moves the moment by 1e-6 of its diagonal.
        return torch.bmm(weights_BGST.flatten(1, 2).to(inputs_BTI.dtype), inputs_BTI).flatten(0, 1)

    def _fused(self, kv_head: int, windows: WindowHeads, chunk_BS: torch.Tensor) -> torch.Tensor:
        """The same by compiled attention, with the same roundings; its rows come in another order."""
        if not self._checked:
            self._weights(kv_head, windows.part(slice(0, 1)), chunk_BS[:1])
        scale = self._spec.layers[self._layer_index].attention_scale
        attended_BGSI = causal_attention(*windows.of_kv_head(kv_head, self._group), scale=scale, positions_BQ=chunk_BS)
        return attended_BGSI.transpose(1, 2).flatten(0, 2)

    def _add_gram(self, window: WindowHeads, positions_1S: torch.Tensor, reference: WindowHeads | None) -> None:
        """Add `X^T (sum A^T A) X` of one window: one product of the width for all query heads of a group."""
        for slot, kv_head in enumerate(self.kv_heads):
            self._add_head_gram(slot, kv_head, window, positions_1S, reference)

    def _add_head_gram(
        self, slot: int, kv_head: int, window: WindowHeads, positions_1S: torch.Tensor, reference: WindowHeads | None
    ) -> None:
        moment = self.moments[slot]
        dtype = moment.sum_II.dtype
        inputs_TI = window.inputs_BTI[0].to(dtype)
        length = inputs_TI.shape[0]
        gram_TT, cross_TT = (torch.zeros(length, length, dtype=dtype, device=inputs_TI.device) for _ in range(2))
        for chunk_1S in torch.split(positions_1S, self._chunk_size(1), dim=1):
            weights_RT = self._weights(kv_head, window, chunk_1S).flatten(0, 2).to(dtype)
            seen = weights_RT.shape[1]
            gram_TT[:seen, :seen].addmm_(weights_RT.T, weights_RT)
            if reference is not None:
                other_RT = self._weights(kv_head, reference, chunk_1S).flatten(0, 2).to(dtype)
                cross_TT[:seen, :seen].addmm_(other_RT.T, weights_RT)
        product_TI = gram_TT @ inputs_TI
        _add_upper(moment.sum_II, inputs_TI, product_TI)
        moment.num_tokens += positions_1S.shape[1] * self._group
        if reference is not None:
            self.shift_sum_KII[slot].addmm_(inputs_TI.T, product_TI, alpha=-1)
            self.shift_sum_KII[slot].addmm_(reference.inputs_BTI[0].to(dtype).T, cross_TT @ inputs_TI)

    def _weights(self, kv_head: int, windows: WindowHeads, chunk_BS: torch.Tensor) -> torch.Tensor:
        first_head = kv_head * self._group
        heads_BGTD = windows.query_BNTD[:, first_head : first_head + self._group]
        index_B1S1 = chunk_BS[:, None, :, None].expand(-1, self._group, -1, heads_BGTD.shape[-1])
        weights_BGST = attention_weights(
            heads_BGTD.gather(2, index_B1S1),
            windows.key_BKTD[:, kv_head, : int(chunk_BS[:, -1].max()) + 1],
            chunk_BS,
            spec=self._spec,
            layer_index=self._layer_index,
            first_head=first_head,
        )
        if not self._checked:
            check_causal(weights_BGST[0], chunk_BS[0], where=f"attention of decoder layer {self._layer_index}")
            self._checked = True
        return weights_BGST

    def _chunk_size(self, num_windows: int) -> int:
        return max(1, min(_POSITIONS_PER_CHUNK, _ROWS_PER_CHUNK // (self._group * num_windows)))


def attends_in_one_call(windows: WindowHeads, spec: DecoderSpec, layer_index: int) -> bool:
    """Say whether a compiled call attends to the inputs, so that no map is ever in memory."""
    layer = spec.layers[layer_index]
    is_plain = spec.alibi is None and spec.attention_softcap is None and layer.sliding_window is None
    heads = windows.of_kv_head(0, spec.num_heads // spec.num_kv_heads)
    return is_plain and attends_causally(*heads, scale=layer.attention_scale)


def attended_bytes(spec: DecoderSpec, num_positions: int, *, num_kv_heads: int, dtype: torch.dtype, shift: bool) -> int:
    """Return the most memory that sums and intermediates of `AttendedMoments` take, its inputs not counted."""
    width, number = spec.hidden_size, dtype.itemsize
    sums = num_kv_heads * width**2 * number * (2 if shift else 1)
    # Scores, mask, softmax and a copy in another dtype; rows of both streams and their difference.
    most_rows = max(_ROWS_PER_CHUNK, MOST_WINDOWS * (spec.num_heads // spec.num_kv_heads))
    keys = MOST_WINDOWS * num_positions * spec.head_dim * 8
    maps = 4 * most_rows * num_positions * 8 + keys
    # Compiled attention makes more rows at a time, and holds windows once more.
    together = max(most_rows, _fused_rows(width))
    rows = 4 * together * width * number + 2 * MOST_WINDOWS * num_positions * (width + spec.head_dim)
    gram = 2 * num_positions**2 * number + 4 * num_positions * width * number
    return sums + maps + max(rows, gram)


def _fused_rows(width: int) -> int:
    return max(_ROWS_PER_CHUNK, _FUSED_NUMBERS // width)


def _gram_is_cheaper(num_rows: int, length: int, width: int) -> bool:
    by_rows = num_rows * width * (length + width)
    by_gram = length * (num_rows * length + width * (length + width))
    return by_gram < by_rows


def _add_upper(sum_II: torch.Tensor, left_TI: torch.Tensor, right_TI: torch.Tensor) -> None:
    """Add `left^T right`, which is symmetric, on and above the diagonal of `sum_II`."""
    for begin in range(0, sum_II.shape[0], _COLUMNS_PER_BLOCK):
        end = begin + _COLUMNS_PER_BLOCK
        sum_II[begin:end, begin:].addmm_(left_TI[:, begin:end].T, right_TI[:, begin:])
