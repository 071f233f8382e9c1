"""Parameters of a whole model's quantized cache: layer by layer, forward passes only.

Shapes: `W` windows, `S` positions, `M` model width, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from optgptq.calibration.states import ActivationStore, MemoryStore
from optgptq.calibration.stream import ActivationStream, embed
from optgptq.checkpoint.source import TensorSource
from optgptq.data.windows import Windows
from optgptq.errors import RecipeError
from optgptq.journal.store import Steps
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.kv_calibration.allocation import allocate_bits
from optgptq.kv_calibration.attend import LayerQuantizer
from optgptq.kv_calibration.candidates import PLAIN
from optgptq.kv_calibration.chains import Chains, LayerOf, copied, hidden_of
from optgptq.kv_calibration.divergence import mean_divergence
from optgptq.kv_calibration.refine import refine_layer
from optgptq.kv_calibration.search import search_layer
from optgptq.kv_calibration.settings import CacheCalibrationSettings
from optgptq.kv_calibration.statistics import measure_layer
from optgptq.models.attention import attention_context
from optgptq.models.loading import SupplyLinear, load_embedding, load_head
from optgptq.models.spec import DecoderSpec

_NOTHING = LayerParameters(keys=SideParameters(), values=SideParameters())
_DIVERGENCE = "divergence"
_Found = tuple[LayerParameters, dict[str, Any]]
"""Parameters of a decoder layer, and what was measured."""
_Walked = tuple[list[_Found], Mapping[str, float]]
"""All of them, and the mean divergence at the end of the model: `calibrated` and `plain`."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StreamedModel:
    """A model that is read one decoder layer at a time.

    Attributes:
        source: embedding and head are read from it.
        spec: its architecture.
        layer_of: reads decoder layer `index`, with the weights that the cache will run beside.
        dtype: of activations.
        device: where it runs.
        store: keeps activations between two decoder layers.
        supply_head: gives the head where it is not dense.
    """

    source: TensorSource
    spec: DecoderSpec
    layer_of: LayerOf
    dtype: torch.dtype
    device: torch.device
    store: ActivationStore = field(default_factory=MemoryStore)
    supply_head: SupplyLinear | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CalibratedCache:
    """What calibration found.

    Attributes:
        scheme: what is stored, with the bits that were allocated.
        layers: parameters of each decoder layer, on the processor.
        record: what was done and measured, as plain values, without times and paths.
    """

    scheme: CacheScheme
    layers: tuple[LayerParameters, ...]
    record: dict[str, Any]


@torch.no_grad()
def calibrate_cache(
    model: StreamedModel,
    settings: CacheCalibrationSettings,
    windows: Windows,
    *,
    steps: Steps,
    layer_started: Callable[[int], None],
) -> CalibratedCache:
    """Return the scheme and the parameters of a cache.

    Args:
        model: the cache runs beside it.
        settings: what is asked for.
        windows: calibration text; the last ones choose among candidates and are in no statistic.
        steps: keeps what was found of each layer; what is there already is not searched again.
        layer_started: called with the index of each layer; twice where bits are allocated.

    Raises:
        RecipeError: fewer than two windows.
        NumericalError: activations are not finite.
        CapacityError, OutputError: a step cannot be written.
    """
    start, num_layers = _start(model, settings, windows), model.spec.num_layers
    schemes, record = settings.schemes, dict[str, Any]()
    if settings.budget_bits is not None:
        chains = Chains.start(copied(start), model.layer_of, num_layers=num_layers, past=settings.past)
        schemes, record["allocation"] = allocate_bits(
            chains, model.spec, settings, steps=steps, layer_started=layer_started
        )
    finished = _finished(steps, num_layers)
    if finished is None:
        chains = Chains.start(start, model.layer_of, num_layers=num_layers, past=settings.past)
        finished = _walk(chains, model, replace(settings, schemes=schemes), steps=steps, layer_started=layer_started)
    found, divergence = finished
    layers = tuple(parameters for parameters, _ in found)
    records = [{"index": index, **told} for index, (_, told) in enumerate(found)]
    calibrated, plain = divergence["calibrated"], divergence["plain"]
    record |= {"layers": records, "held_out_kl": calibrated, "held_out_kl_plain": plain}
    record["is_plain"] = calibrated > plain
    if calibrated > plain:
        layers = (_NOTHING,) * num_layers
        # What is told of the cache is told of the one that is written.
        record |= {"held_out_kl": plain, "held_out_kl_discarded": calibrated}
        record["layers"] = [_plain_record(told) for told in records]
    return CalibratedCache(scheme=CacheScheme(layers=schemes, past=settings.past), layers=layers, record=record)


def _start(model: StreamedModel, settings: CacheCalibrationSettings, windows: Windows) -> ActivationStream:
    if windows.num_windows < 2:
        raise RecipeError(
            "calibration.num_windows",
            expected="at least 2 windows: one to measure on, one to choose with",
            found=str(windows.num_windows),
            action="Set calibration.num_windows to 2 or more, or name a longer text.",
        )
    held_out = min(max(round(windows.num_windows * settings.held_out_share), 1), windows.num_windows - 1)
    context = attention_context(model.spec, windows.window_size, dtype=model.dtype, device=model.device)
    embedding = load_embedding(model.source, model.spec, dtype=model.dtype, device=model.device)
    return embed(windows, embedding, context, windows_per_batch=None, num_held_out=held_out, store=model.store)


def _name(index: int) -> str:
    return f"layer-{index:05d}"


def _finished(steps: Steps, num_layers: int) -> _Walked | None:
    """Return what `_walk` returned before; None where it did not come to its end."""
    divergence = steps.get(_DIVERGENCE)
    if divergence is None:
        return None
    layers = [_known(steps, index) for index in range(num_layers)]
    found = [layer for layer in layers if layer is not None]
    return (found, divergence.facts) if len(found) == num_layers else None


def _known(steps: Steps, index: int) -> _Found | None:
    entry = steps.get(_name(index))
    return None if entry is None else (LayerParameters.of_tensors(entry.tensors), dict(entry.facts))


def _walk(
    chains: Chains,
    model: StreamedModel,
    settings: CacheCalibrationSettings,
    *,
    steps: Steps,
    layer_started: Callable[[int], None],
) -> _Walked:
    """Return what was found of each decoder layer, and the divergence at the end of the model."""
    found: list[_Found] = []
    for index, scheme in enumerate(settings.schemes):
        layer_started(index)
        layer = _known(steps, index)
        if layer is None:
            layer = _searched(chains, scheme, settings)
            steps.put(_name(index), layer[0].tensors, layer[1])
            steps.sync()
        # From what a step gives back, also where it was found just now: products of other strides may differ.
        chosen, plain = (LayerQuantizer.of(scheme, each, model.device) for each in (layer[0], _NOTHING))
        chains.advance(chosen, plain)
        found.append(layer)
    head = load_head(model.source, model.spec, dtype=model.dtype, device=model.device, supply_linear=model.supply_head)
    calibrated, rounded = (
        mean_divergence(
            head, hidden_of(chains.ahead[0]), hidden_of(kept), [batch.valid_BS for batch in chains.held_out]
        )
        for kept in ([batch.kept for batch in chains.held_out], chains.plain)
    )
    divergence = {"calibrated": calibrated, "plain": rounded}
    steps.put(_DIVERGENCE, {}, divergence)
    steps.sync()
    return found, divergence


def _searched(chains: Chains, scheme: LayerScheme, settings: CacheCalibrationSettings) -> _Found:
    """Return the parameters of the layer before which `chains` stands, on the processor, and what was measured."""
    if scheme.is_exact:
        return _NOTHING, {"key_bits": scheme.keys.bits, "value_bits": scheme.values.bits}
    layer, judge = chains.layer(), chains.judge()
    statistics = measure_layer(
        chains.stream, layer, settings.past, reservoir_tokens=settings.reservoir_tokens, seed=settings.seed
    )
    found = search_layer(judge, statistics, scheme, settings)
    if settings.refine == "gradient":
        found = refine_layer(judge, chains.stream, statistics, scheme, found)
    record = found.record(scheme) | {
        "key_maximum": statistics.key_maximum_K.tolist(),
        "value_maximum": statistics.value_maximum_K.tolist(),
        "sinks": list(statistics.sinks),
    }
    tensors = {name: part.float().cpu().contiguous() for name, part in found.parameters.tensors.items()}
    return LayerParameters.of_tensors(tensors), record


def _plain_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a decoder layer that is rounded to the nearest, though a search found something else."""
    if "score" not in record:
        return record
    sides = ("keys", "values")
    return {
        **record,
        **{side: None if record[side] is None else PLAIN for side in sides},
        "score": record["plain_score"],
        "discarded": {name: record[name] for name in (*sides, "score")},
    }
