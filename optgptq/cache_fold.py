"""Channel scales of keys and values that are moved into the weights, found before anything is quantized.

Shapes: `K` key/value heads, `T` vectors, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from optgptq.calibration.states import ActivationPlace
from optgptq.calibration.stream import ActivationStream, embed
from optgptq.checkpoint.source import TensorSource
from optgptq.data.windows import Windows
from optgptq.journal.store import Steps
from optgptq.kv_cache.scheme import LayerScheme, SideScheme
from optgptq.kv_calibration.candidates import SideStatistics
from optgptq.kv_calibration.scales import RangeProblem, fixed_point_scale
from optgptq.kv_calibration.search import key_side, value_side
from optgptq.kv_calibration.settings import CacheCalibrationSettings
from optgptq.kv_calibration.statistics import measure_layer
from optgptq.models.attention import attention_context
from optgptq.models.layer import DecoderLayer
from optgptq.models.loading import load_embedding, load_layer
from optgptq.models.spec import STAGE_NAMES, DecoderSpec
from optgptq.reports import events
from optgptq.reports.events import ProgressListener
from optgptq.transforms.kv_scales import KVScales, shares_key_scale


def scales_to_fold(
    source: TensorSource,
    spec: DecoderSpec,
    settings: CacheCalibrationSettings,
    windows: Windows,
    *,
    steps: Steps,
    place: ActivationPlace,
    progress: ProgressListener,
) -> tuple[KVScales, ...]:
    """Return the scales of each decoder layer; None for sides that are exact or have groups along tokens.

    Where all heads of a layer share the gain of a norm, their keys share one scale. What is in `steps` is not measured
    again, and nothing is computed where all is there.

    Raises:
        NumericalError: activations are not finite.
        CapacityError, OutputError: a step cannot be written.
    """
    dtype, device = place.dtype, place.device
    known = [steps.get(_name(index)) for index in range(spec.num_layers)]
    found = [None if entry is None else KVScales(**entry.tensors) for entry in known]
    if None in found:
        stream = embed(
            windows,
            load_embedding(source, spec, dtype=dtype, device=device),
            attention_context(spec, windows.window_size, dtype=dtype, device=device),
            windows_per_batch=None,
            store=place.store,
        )
        for index, scheme in enumerate(settings.schemes):
            progress(events.PhaseStarted(name="scales to fold", detail=f"decoder layer {index + 1}/{spec.num_layers}"))
            layer = load_layer(source, spec, index, dtype=dtype, device=device)
            if found[index] is None:
                scales = found[index] = _layer_scales(stream, layer, scheme, settings)
                steps.put(_name(index), scales.tensors, {})
                steps.sync()
            for stage in STAGE_NAMES:
                stream.advance(layer, stage)
    return tuple(scales for scales in found if scales is not None)


def _name(index: int) -> str:
    return f"layer-{index:05d}"


def _layer_scales(
    stream: ActivationStream, layer: DecoderLayer, scheme: LayerScheme, settings: CacheCalibrationSettings
) -> KVScales:
    if scheme.is_exact:
        return KVScales()
    statistics = measure_layer(
        stream, layer, settings.past, reservoir_tokens=settings.reservoir_tokens, seed=settings.seed
    )
    keys, values = key_side(statistics, layer.spec, layer.index), value_side(statistics)
    return KVScales(
        key_KD=_scale(keys, scheme.keys, is_shared=shares_key_scale(layer.spec)),
        value_KD=_scale(values, scheme.values, is_shared=False),
    )


def _scale(side: SideStatistics, scheme: SideScheme, *, is_shared: bool) -> torch.Tensor | None:
    """Return the float64 scale `[K, D]` with the smallest objective."""
    if scheme.is_exact or scheme.axis == "token":
        return None
    x_KTD = side.x_KTD - side.mean_KD.unsqueeze(1) if side.can_shift else side.x_KTD
    problem = RangeProblem(
        x_KTD=x_KTD,
        weight_KD=side.metric_KDD.diagonal(dim1=1, dim2=2),
        mass_KT=side.mass_KT,
        group_size=scheme.group_size,
        partner_D=side.partner_D,
    )
    num_heads = len(x_KTD)
    if is_shared:
        problem = replace(
            problem,
            x_KTD=x_KTD.flatten(0, 1).unsqueeze(0),
            weight_KD=problem.weight_KD.mean(0, keepdim=True),
            mass_KT=side.mass_KT.flatten().unsqueeze(0),
        )
    scale_KD = fixed_point_scale(problem)
    return scale_KD.expand(num_heads, -1).double().cpu().contiguous()
