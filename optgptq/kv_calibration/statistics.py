"""What is measured of the heads of one decoder layer: forward passes only, with the weights already quantized.

Shapes: `B` windows of a batch, `S` positions, `T` vectors of the reservoir, `N` query heads, `K` key/value heads,
`D` head dimension, `I` input columns of the output projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from optgptq.calibration.positions import drawn_positions, window_generator, window_lengths
from optgptq.calibration.stream import ActivationStream
from optgptq.errors import NumericalError
from optgptq.kv_cache.scheme import PastRule
from optgptq.kv_calibration.probes import probe_window
from optgptq.models.layer import DecoderLayer
from optgptq.numerics import exact_float32_products

# A token whose key is this many times longer than the median one of its window, or shorter by as much, is a sink.
_SINK_RATIO = 5.0
# Share of the plain moment of queries in the metric of keys: few probes leave directions unseen.
_PLAIN_SHARE = 0.2


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerStatistics:
    """Of one decoder layer, without windows that are held out; first tokens that are kept exactly count in maxima only.

    Attributes:
        key_KTD, value_KTD: float32, the reservoir: rotated keys, and values.
        key_mass_KT, value_mass_KT: what an error of the token costs, over the mean of that.
        key_metric_KDD: float32, mean over queries of `q q^T`, those weighted whose scores matter; trace as unweighted.
        value_metric_KDD: float32, sum over query heads of a group of the Gram matrices of `reader_metrics`.
        key_mean_KD, value_mean_KD: float32, over all tokens.
        key_maximum_K, value_maximum_K: largest absolute numbers.
        sinks: positions beyond the first exact ones whose keys are unusually long or short in most windows.
    """

    key_KTD: torch.Tensor
    value_KTD: torch.Tensor
    key_mass_KT: torch.Tensor
    value_mass_KT: torch.Tensor
    key_metric_KDD: torch.Tensor
    value_metric_KDD: torch.Tensor
    key_mean_KD: torch.Tensor
    value_mean_KD: torch.Tensor
    key_maximum_K: torch.Tensor
    value_maximum_K: torch.Tensor
    sinks: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Collected:
    """One entry per window."""

    key_KTD: list[torch.Tensor] = field(default_factory=list)
    value_KTD: list[torch.Tensor] = field(default_factory=list)
    key_mass_KT: list[torch.Tensor] = field(default_factory=list)
    value_mass_KT: list[torch.Tensor] = field(default_factory=list)
    query_KDD: list[torch.Tensor] = field(default_factory=list)
    probed_KDD: list[torch.Tensor] = field(default_factory=list)
    key_KD: list[torch.Tensor] = field(default_factory=list)
    value_KD: list[torch.Tensor] = field(default_factory=list)
    key_maximum_K: list[torch.Tensor] = field(default_factory=list)
    value_maximum_K: list[torch.Tensor] = field(default_factory=list)
    outlier_S: list[torch.Tensor] = field(default_factory=list)
    num_tokens: int = 0


def measure_layer(
    stream: ActivationStream, layer: DecoderLayer, past: PastRule, *, reservoir_tokens: int, seed: int
) -> LayerStatistics:
    """Return the statistics of `layer`, before which `stream` stands.

    Raises:
        NumericalError: a query, a key or a value is not finite.
    """
    windows = sum(batch.num_windows for batch in stream.batches if not batch.held_out)
    number = max(reservoir_tokens // windows, 1)
    reader_NDD = reader_metrics(layer, torch.empty(0, dtype=stream.dtype, device=stream.device))
    collected = _Collected()
    with exact_float32_products():
        for window, heads in window_heads(stream, layer):
            _collect(collected, heads, layer, reader_NDD, past)
            generator = window_generator(seed * layer.spec.num_layers + layer.index, window)
            first = _num_skipped(past, heads[1].shape[1])
            chosen_T = first + drawn_positions(heads[1].shape[1] - first, number, generator).to(heads[1].device)
            collected.key_KTD.append(heads[1][:, chosen_T].float())
            collected.value_KTD.append(heads[2][:, chosen_T].float())
            collected.key_mass_KT[-1] = collected.key_mass_KT[-1][:, chosen_T]
            collected.value_mass_KT[-1] = collected.value_mass_KT[-1][:, chosen_T]
    return _statistics(collected, reader_NDD, past, num_heads=layer.spec.num_heads)


def window_heads(
    stream: ActivationStream, layer: DecoderLayer
) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Yield index, queries `[N, S, D]`, keys and values `[K, S, D]` of each window that is not held out, unpadded."""
    for batch in (batch for batch in stream.batches if not batch.held_out):
        inputs_BSM = layer.stage_input("qkv", batch.state, stream.context)
        heads = layer.project_heads(inputs_BSM, stream.context)
        _require_finite(layer, heads)
        for row, length in enumerate(window_lengths(batch.valid_BS, inputs_BSM)):
            query_NSD, key_KSD, value_KSD = (part[row, :, :length] for part in heads)
            yield batch.first_window + row, (query_NSD, key_KSD, value_KSD)


def reader_metrics(layer: DecoderLayer, like: torch.Tensor) -> torch.Tensor:
    """Return float32 `[N, D, D]`: Gram matrices of the columns of the output projection that read each query head."""
    (name,) = layer.spec.stage("o").linears
    width = layer.spec.num_heads * layer.spec.head_dim
    # Whatever stands in for a linear has the same call: its columns are what it makes of unit vectors.
    ends_IO = layer.linears[name](torch.eye(width, dtype=like.dtype, device=like.device)).float()
    columns_IO = ends_IO - layer.linears[name](like.new_zeros(1, width)).float()
    columns_NDO = columns_IO.view(layer.spec.num_heads, layer.spec.head_dim, -1)
    with exact_float32_products():
        return torch.matmul(columns_NDO, columns_NDO.transpose(1, 2))


def _collect(
    collected: _Collected,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layer: DecoderLayer,
    reader_NDD: torch.Tensor,
    past: PastRule,
) -> None:
    key_KSD, value_KSD = heads[1].float(), heads[2].float()
    first = _num_skipped(past, key_KSD.shape[1])
    probed = probe_window(layer, heads, reader_NDD, past)
    query_KTD = heads[0][:, first:].float().reshape(len(key_KSD), -1, key_KSD.shape[2])
    collected.query_KDD.append(torch.matmul(query_KTD.transpose(1, 2), query_KTD).double())
    collected.probed_KDD.append(probed.query_KDD.double())
    collected.key_mass_KT.append(probed.key_mass_KS)
    collected.value_mass_KT.append(probed.value_mass_KS)
    collected.key_KD.append(key_KSD[:, first:].sum(1, dtype=torch.float64))
    collected.value_KD.append(value_KSD[:, first:].sum(1, dtype=torch.float64))
    collected.key_maximum_K.append(key_KSD.abs().amax((1, 2)))
    collected.value_maximum_K.append(value_KSD.abs().amax((1, 2)))
    length_KS = key_KSD.norm(dim=2)
    ratio_KS = length_KS / length_KS.median(1, keepdim=True).values.clamp_min(1e-12)
    collected.outlier_S.append(((ratio_KS > _SINK_RATIO) | (ratio_KS < 1 / _SINK_RATIO)).any(0).nonzero().flatten())
    collected.num_tokens += key_KSD.shape[1] - first


def _statistics(collected: _Collected, reader_NDD: torch.Tensor, past: PastRule, *, num_heads: int) -> LayerStatistics:
    plain_KDD, probed_KDD = (torch.stack(part).sum(0) for part in (collected.query_KDD, collected.probed_KDD))
    num_kv_heads = len(plain_KDD)
    plain_KDD = plain_KDD / (collected.num_tokens * num_heads // num_kv_heads)
    positions = torch.cat(collected.outlier_S).cpu()
    counts = torch.bincount(positions) if len(positions) else torch.zeros(0, dtype=torch.int64)
    often = (counts > len(collected.outlier_S) / 2).nonzero().flatten().tolist()
    return LayerStatistics(
        key_KTD=torch.cat(collected.key_KTD, 1),
        value_KTD=torch.cat(collected.value_KTD, 1),
        key_mass_KT=_relative(torch.cat(collected.key_mass_KT, 1)),
        value_mass_KT=_relative(torch.cat(collected.value_mass_KT, 1)),
        key_metric_KDD=_key_metric(plain_KDD, probed_KDD).float(),
        value_metric_KDD=reader_NDD.view(num_kv_heads, -1, *reader_NDD.shape[1:]).sum(1),
        key_mean_KD=(torch.stack(collected.key_KD).sum(0) / collected.num_tokens).float(),
        value_mean_KD=(torch.stack(collected.value_KD).sum(0) / collected.num_tokens).float(),
        key_maximum_K=torch.stack(collected.key_maximum_K).amax(0),
        value_maximum_K=torch.stack(collected.value_maximum_K).amax(0),
        sinks=tuple(position for position in often if position >= past.sink_tokens),
    )


def _key_metric(plain_KDD: torch.Tensor, probed_KDD: torch.Tensor) -> torch.Tensor:
    """Return the weighted moment with a share of the plain one, at the plain one's trace."""
    plain_K, probed_K = (part.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] for part in (plain_KDD, probed_KDD))
    weighted_KDD = torch.where(probed_K > 0, probed_KDD * (plain_K / probed_K.clamp_min(1e-300)), plain_KDD)
    return _PLAIN_SHARE * plain_KDD + (1 - _PLAIN_SHARE) * weighted_KDD


def _relative(mass_KT: torch.Tensor) -> torch.Tensor:
    """Return the mass over its mean; ones where a head has none."""
    mean_K1 = mass_KT.mean(1, keepdim=True)
    return torch.where(mean_K1 > 0, mass_KT / mean_K1.clamp_min(1e-30), 1.0)


def _num_skipped(past: PastRule, length: int) -> int:
    return min(past.sink_tokens, length - 1)


def _require_finite(layer: DecoderLayer, heads: tuple[torch.Tensor, ...]) -> None:
    for name, part in zip(("queries", "keys", "values"), heads, strict=True):
        if not bool(torch.isfinite(part).all()):
            raise NumericalError(
                f"{name} of decoder layer {layer.index}",
                expected="finite numbers over the calibration text",
                found="NaN or infinity",
                action="Check the model's weights with `optgptq verify`; compute_dtype=float32 avoids overflow.",
            )
