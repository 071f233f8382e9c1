"""Shift and scale moved by gradients through the following layers: for comparison with what needs none.

Codes are constants of the gradient; a rounding error is the step of its group times a constant, so that a scale is
judged by the range that it makes and by what it multiplies the noise with. What is found is kept where it does better
on windows that no gradient saw.

Source: WKVQuant, arXiv 2402.12065, cross-block reconstruction; steps as in LSQ, arXiv 1902.08153.

Shapes: `B` windows of a batch, `K` key/value heads, `S` positions, `T` tokens, `G` groups, `D` head dimension,
`M` model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from optgptq.calibration.stream import ActivationStream
from optgptq.kernels.through_codes import through_codes
from optgptq.kv_cache.codec import SideCodec
from optgptq.kv_cache.scheme import LayerScheme, SideScheme
from optgptq.kv_cache.setup import SideParameters
from optgptq.kv_cache.transform import transform_vectors
from optgptq.kv_calibration.attend import LayerQuantizer, restore_vectors
from optgptq.kv_calibration.candidates import Candidate, SideStatistics, stored_metric
from optgptq.kv_calibration.score import BlockScore, quantized_context
from optgptq.kv_calibration.search import FoundLayer, key_side, quantizer_of, value_side
from optgptq.kv_calibration.statistics import LayerStatistics

_NUM_STEPS = 40
_LEARNING_RATE = 0.01
_WINDOWS_PER_STEP = 2


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Trained:
    """One side with numbers that gradients move.

    Attributes:
        scheme, start: what it began with.
        statistics: of the side.
        shift_KD: in units of `unit_KD`; None where there is no shift.
        log_scale_KD: one number per channel; the two of a pair are averaged.
        unit_KD: mean absolute numbers of the channels.
    """

    scheme: SideScheme
    start: Candidate
    statistics: SideStatistics
    shift_KD: torch.Tensor | None
    log_scale_KD: torch.Tensor
    unit_KD: torch.Tensor

    @classmethod
    def of(cls, scheme: SideScheme, start: Candidate, statistics: SideStatistics) -> _Trained:
        scale_KD, shift_KD = start.parameters.scale_KD, start.parameters.shift_KD
        log_KD = torch.zeros_like(statistics.mean_KD) if scale_KD is None else scale_KD.log()
        unit_KD = statistics.x_KTD.abs().mean(1).clamp_min(1e-6)
        if statistics.can_shift:
            shift_KD = torch.zeros_like(statistics.mean_KD) if shift_KD is None else shift_KD / unit_KD
        return cls(
            scheme=scheme,
            start=start,
            statistics=statistics,
            shift_KD=None if shift_KD is None else shift_KD.clone().requires_grad_(),
            log_scale_KD=log_KD.clone().requires_grad_(),
            unit_KD=unit_KD,
        )

    @property
    def numbers(self) -> list[torch.Tensor]:
        return [self.log_scale_KD] if self.shift_KD is None else [self.log_scale_KD, self.shift_KD]

    def parameters(self) -> SideParameters:
        """Return the parameters as they stand; the metric is a constant of the gradient."""
        tied_KD = (self.log_scale_KD + self.log_scale_KD[:, self.statistics.partner_D]) / 2
        moved = replace(
            self.start.parameters,
            scale_KD=tied_KD.exp(),
            shift_KD=None if self.shift_KD is None else self.shift_KD * self.unit_KD,
        )
        if moved.metric_KDD is None:
            return moved
        with torch.no_grad():
            return replace(moved, metric_KDD=stored_metric(self.statistics.metric_KDD, moved))

    def __call__(self, x_BKSD: torch.Tensor) -> torch.Tensor:
        side, size = self.parameters(), self.scheme.group_size
        x_TKD = x_BKSD.transpose(1, 2).flatten(0, 1).float()
        y_TKD = transform_vectors(x_TKD, side)
        y_TKGL = y_TKD.view(*y_TKD.shape[:2], -1, size)
        step_TKG1 = (y_TKGL.amax(3, keepdim=True) - y_TKGL.amin(3, keepdim=True)).clamp_min(1e-12)
        with torch.no_grad():
            codec = SideCodec.of(self.scheme, side, y_TKD.device)
            error_TKGL = (through_codes(y_TKD, codec) - y_TKD).view_as(y_TKGL) / step_TKG1
        found_TKD = restore_vectors((y_TKGL + step_TKG1 * error_TKGL).view_as(y_TKD), side)
        return found_TKD.view(len(x_BKSD), -1, *x_TKD.shape[1:]).transpose(1, 2).to(x_BKSD.dtype)

    def candidate(self) -> Candidate:
        with torch.no_grad():
            side = self.parameters()
            scale_KD, shift_KD = side.scale_KD, side.shift_KD
            assert scale_KD is not None
            tied_KD = torch.maximum(scale_KD, scale_KD[:, self.statistics.partner_D]).detach()
            side = replace(side, scale_KD=tied_KD, shift_KD=None if shift_KD is None else shift_KD.detach())
        return Candidate(name=f"{self.start.name}, refined", parameters=side)


def refine_layer(
    judge: BlockScore, stream: ActivationStream, statistics: LayerStatistics, scheme: LayerScheme, found: FoundLayer
) -> FoundLayer:
    """Return the layer with refined shifts and scales where they score better, else `found`.

    Sides with groups along tokens and exact sides stay as they are.
    """
    spec, index = judge.layers[0].spec, judge.layers[0].index
    keys = _trained(scheme.keys, found.keys, key_side(statistics, spec, index))
    values = _trained(scheme.values, found.values, value_side(statistics))
    trained = [side for side in (keys, values) if side is not None]
    if not trained:
        return found
    with torch.enable_grad():
        _descend(
            judge,
            stream,
            trained,
            LayerQuantizer(keys=keys or found.quantizer.keys, values=values or found.quantizer.values),
        )
    new_keys = found.keys if keys is None else keys.candidate()
    new_values = found.values if values is None else values.candidate()
    quantizer = quantizer_of(scheme, new_keys, new_values, statistics.key_KTD.device)
    score = judge.cross_block(quantizer)
    if not score < found.score:
        return found
    return replace(found, keys=new_keys, values=new_values, quantizer=quantizer, score=score)


def _trained(scheme: SideScheme, start: Candidate | None, statistics: SideStatistics) -> _Trained | None:
    if start is None or scheme.axis == "token":
        return None
    return _Trained.of(scheme, start, statistics)


def _descend(judge: BlockScore, stream: ActivationStream, trained: list[_Trained], quantizer: LayerQuantizer) -> None:
    """Move the numbers of `trained` by AdamW on windows that are not held out, targets made with an exact past."""
    optimizer = torch.optim.AdamW(
        [number for side in trained for number in side.numbers], lr=_LEARNING_RATE, weight_decay=0.0
    )
    quantized = quantized_context(judge.context, {judge.layers[0].index: quantizer}, judge.past)
    for (hidden_BSM, valid_BS), _ in zip(_windows(stream), range(_NUM_STEPS), strict=False):
        with torch.no_grad():
            near_BSM = judge.layers[0].forward(hidden_BSM, judge.context)
            far_BSM = _through(judge, near_BSM)
        found_BSM = judge.layers[0].forward(hidden_BSM, quantized)
        loss = _difference(found_BSM, near_BSM, valid_BS) + _difference(_through(judge, found_BSM), far_BSM, valid_BS)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _windows(stream: ActivationStream) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield a few windows at a time, without end."""
    while True:
        for batch in (batch for batch in stream.batches if not batch.held_out):
            hidden_BSM = batch.state.hidden_BSM
            for first in range(0, batch.num_windows, _WINDOWS_PER_STEP):
                part = slice(first, first + _WINDOWS_PER_STEP)
                yield hidden_BSM[part], None if batch.valid_BS is None else batch.valid_BS[part]


def _through(judge: BlockScore, hidden_BSM: torch.Tensor) -> torch.Tensor:
    for layer in judge.layers[1:]:
        hidden_BSM = layer.forward(hidden_BSM, judge.context)
    return hidden_BSM


def _difference(found_BSM: torch.Tensor, expected_BSM: torch.Tensor, valid_BS: torch.Tensor | None) -> torch.Tensor:
    difference_BSM, size_BSM = (found_BSM - expected_BSM).float().abs(), expected_BSM.float().abs()
    if valid_BS is not None:
        difference_BSM, size_BSM = difference_BSM[valid_BS], size_BSM[valid_BS]
    return difference_BSM.mean() / size_BSM.mean().clamp_min(1e-12)
