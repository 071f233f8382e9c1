"""Moments that tell a solver how an error of a query, key or value projection reaches the output of attention.

Row factors `[D, D]` stand beside the input moment of the stage: an error `dW` of one head's projection costs
`tr(H_out dW H_in dW^T)`. The value projection has a moment of its inputs of its own instead, per key/value head.
All sums are additive: streamed, split and merged they are the same.

Shapes: `B` windows of a batch, `S` positions, `M` model width, `I` input columns, `N` query heads, `K` key/value heads,
`D` head dimension, `T` valid positions of one window.
Source: BoA, arXiv 2406.13474; aespa, arXiv 2402.08958, eq. 15 to 22. Details: docs/math/attention-moments.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from optgptq.calibration.attended_moments import MOST_WINDOWS, AttendedMoments, WindowHeads, attended_bytes
from optgptq.calibration.attention_inputs import AttentionInputs
from optgptq.calibration.normed_heads import NormedHeads
from optgptq.calibration.positions import drawn_positions, window_generator, window_lengths
from optgptq.calibration.rope_average import average_over_positions
from optgptq.models.layer import DecoderLayer
from optgptq.models.norm import Norm
from optgptq.models.spec import DecoderSpec
from optgptq.numerics import exact_float32_products


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMomentSettings:
    """What is collected, and how much of it.

    Attributes:
        dtype: accumulator, float32 or float64.
        rows: collect the row factors of queries and keys.
        value_heads: key/value heads whose value moment is collected; empty for none.
        value_shift: collect the shift between two streams beside the value moment.
        value_share: share of the positions of every window whose attended inputs count, above 0 and at most 1.
        norm_tokens: positions of every window, at least 1, at which the derivative of a query or key norm is taken.
        seed: of the positions that are drawn. A window's positions depend on its index only.
    """

    dtype: torch.dtype = torch.float32
    rows: bool = True
    value_heads: range = range(0)
    value_shift: bool = False
    value_share: float = 1.0
    norm_tokens: int = 16
    seed: int = 0


class AttentionMoments:
    """Collector of one decoder layer: sums over calibration windows.

    Attributes:
        settings: what is collected.
        num_positions: positions of a window, padding included.
        num_tokens: tokens in the row factors.
        attended: sums of the value moment.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        settings: AttentionMomentSettings,
        *,
        num_positions: int,
        device: torch.device | str = "cpu",
    ) -> None:
        spec, dtype, size = layer.spec, settings.dtype, layer.spec.head_dim
        self.settings = settings
        self.num_positions = num_positions
        self.num_tokens = 0
        self.attended = AttendedMoments(
            spec, layer.index, settings.value_heads, dtype=dtype, shift=settings.value_shift, device=device
        )
        self._spec = spec
        self._rope = spec.layers[layer.index].rope
        self._query_sum_NDD = torch.zeros(spec.num_heads, size, size, dtype=dtype, device=device)
        self._key_sum_KDD = torch.zeros(spec.num_kv_heads, size, size, dtype=dtype, device=device)
        self._position_count_S = torch.zeros(num_positions, dtype=torch.int64, device=device)
        self._normed_query = self._normed(layer.norms.query)
        self._normed_key = self._normed(layer.norms.key)

    def add(
        self,
        inputs: AttentionInputs,
        valid_BS: torch.Tensor | None = None,
        *,
        first_window: int = 0,
        reference: AttentionInputs | None = None,
    ) -> None:
        """Add a batch of windows.

        Args:
            inputs: the stream that is measured.
            valid_BS: bool, False at padding, which only ends a window; None where nothing is padded.
            first_window: index of the batch's first window among all, which seeds the drawn positions.
            reference: the same batch in the full-precision stream; needed for `value_shift`, and only then.

        Raises:
            NumericalError: attention is not a causal softmax.
        """
        device, lengths = inputs.inputs_BSM.device, window_lengths(valid_BS, inputs.inputs_BSM)
        drawn = []
        for row, length in enumerate(lengths):
            generator = window_generator(self.settings.seed, first_window + row)
            number = max(1, round(self.settings.value_share * length))
            drawn.append(drawn_positions(length, number, generator) if length else None)
            if length and self.settings.rows:
                norm_positions = drawn_positions(length, min(self.settings.norm_tokens, length), generator)
                self._add_rows(inputs, row, length, norm_positions)
        if not self.settings.value_heads:
            return
        for length, rows in _alike(lengths):
            positions_BS = torch.stack([each for each in drawn[rows] if each is not None]).to(device)
            other = None if reference is None else _windows(reference, rows, length)
            self.attended.add(_windows(inputs, rows, length), positions_BS, reference=other)

    def merge(self, other: AttentionMoments) -> None:
        """Add what another part of the calibration set measured with the same settings."""
        device = self._query_sum_NDD.device
        self._query_sum_NDD += other._query_sum_NDD.to(device)
        self._key_sum_KDD += other._key_sum_KDD.to(device)
        self._position_count_S += other._position_count_S.to(device)
        self.num_tokens += other.num_tokens
        self.attended.merge(other.attended)
        for mine, theirs in ((self._normed_query, other._normed_query), (self._normed_key, other._normed_key)):
            if mine is not None and theirs is not None:
                mine.merge(theirs)

    def is_finite(self) -> bool:
        """False as soon as something that was added is not finite, or its square overflowed."""
        sums = (self._query_sum_NDD, self._key_sum_KDD)
        samples = [normed for normed in (self._normed_query, self._normed_key) if normed is not None]
        return (
            all(bool(torch.isfinite(each).all()) for each in sums)
            and all(sample.is_finite() for sample in samples)
            and self.attended.is_finite()
        )

    def query_output_moments(self) -> torch.Tensor:
        """Return the row factor of each query head's projection, float64 `[N, D, D]`, symmetric."""
        group = self._spec.num_heads // self._spec.num_kv_heads
        moment_KDD = self._key_sum_KDD.double() / max(self.num_tokens, 1)
        if self._normed_query is not None:
            return self._normed_query.row_factor(moment_KDD.repeat_interleave(group, dim=0))
        return self._averaged(moment_KDD).repeat_interleave(group, dim=0)

    def key_output_moments(self) -> torch.Tensor:
        """Return the row factor of each key head's projection, float64 `[K, D, D]`: the mean over its query heads."""
        size = self._spec.head_dim
        grouped = self._query_sum_NDD.double().reshape(self._spec.num_kv_heads, -1, size, size)
        moment_KDD = grouped.mean(dim=1) / max(self.num_tokens, 1)
        return self._averaged(moment_KDD) if self._normed_key is None else self._normed_key.row_factor(moment_KDD)

    def value_input_moment(self, kv_head: int) -> torch.Tensor:
        """Return the mean second moment `[I, I]` of the attended inputs of one collected key/value head."""
        return self.attended.moments[self.settings.value_heads.index(kv_head)].mean()

    def value_input_moments(self) -> torch.Tensor:
        """Return `value_input_moment` of all collected heads, `[K, I, I]`."""
        return torch.stack([self.value_input_moment(kv_head) for kv_head in self.settings.value_heads])

    def value_shift_moment(self, kv_head: int) -> torch.Tensor:
        """Return the mean `[I, I]` of `(y_reference - y) y^T` over the attended inputs `y` of one head."""
        return self.attended.shift_mean(kv_head)

    def _normed(self, norm: Norm | None) -> NormedHeads | None:
        return None if norm is None else NormedHeads(norm, self._rope, num_positions=self.num_positions)

    def _add_rows(self, inputs: AttentionInputs, row: int, length: int, norm_positions: torch.Tensor) -> None:
        streams = ((self._query_sum_NDD, inputs.query_BNSD), (self._key_sum_KDD, inputs.key_BKSD))
        for sum_NDD, heads_BNSD in streams:
            heads_NTD = heads_BNSD[row, :, :length].to(sum_NDD.dtype)
            with exact_float32_products():
                sum_NDD.baddbmm_(heads_NTD.mT, heads_NTD)
        self._position_count_S[:length] += 1
        self.num_tokens += length
        raws = ((self._normed_query, inputs.raw_query_BNSD), (self._normed_key, inputs.raw_key_BKSD))
        for normed, raw_BNSD in raws:
            if normed is None:
                continue
            if raw_BNSD is None:
                raise ValueError("a layer with query and key norms needs the projections before them")
            positions_T = norm_positions.to(raw_BNSD.device)
            normed.add(raw_BNSD[row].transpose(0, 1)[positions_T], positions_T)

    def _averaged(self, moment_KDD: torch.Tensor) -> torch.Tensor:
        if self._rope is not None:
            weight_S = self._position_count_S
            moment_KDD = average_over_positions(moment_KDD, self._rope, self.num_positions, weight_KS=weight_S)
        return (moment_KDD + moment_KDD.mT) / 2


def bytes_needed(spec: DecoderSpec, settings: AttentionMomentSettings, *, num_positions: int, num_windows: int) -> int:
    """Return the most memory an `AttentionMoments` takes while windows are added, their activations not counted."""
    heads = spec.num_heads + spec.num_kv_heads
    rows = heads * spec.head_dim**2 * settings.dtype.itemsize
    window = heads * spec.head_dim * num_positions * settings.dtype.itemsize if settings.rows else 0
    normed = spec.names.query_norm is not None and settings.rows
    sample = heads * spec.head_dim * 4 * num_windows * settings.norm_tokens if normed else 0
    attended = attended_bytes(
        spec,
        num_positions,
        num_kv_heads=len(settings.value_heads),
        dtype=settings.dtype,
        shift=settings.value_shift,
    )
    return rows + window + sample + (attended if settings.value_heads else 0)


def _windows(inputs: AttentionInputs, rows: slice, length: int) -> WindowHeads:
    return WindowHeads(
        inputs.query_BNSD[rows, :, :length], inputs.key_BKSD[rows, :, :length], inputs.inputs_BSM[rows, :length]
    )


def _alike(lengths: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield windows of one length that stand side by side, `MOST_WINDOWS` at most; empty ones are left out."""
    begin = 0
    for end in range(1, len(lengths) + 1):
        if end < len(lengths) and lengths[end] == lengths[begin] and end - begin < MOST_WINDOWS:
            continue
        if lengths[begin]:
            yield lengths[begin], slice(begin, end)
        begin = end
