"""Parameters of a whole model's quantized cache: layer by layer, forward passes only.

Shapes: `W` windows, `S` positions, `M` model width, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from optgptq.calibration.stream import ActivationStream, embed
from optgptq.checkpoint.source import TensorSource
from optgptq.data.windows import Windows
from optgptq.errors import RecipeError
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.kv_calibration.allocation import allocate_bits
from optgptq.kv_calibration.attend import LayerQuantizer, on_device
from optgptq.kv_calibration.chains import Chains, LayerOf, copied
from optgptq.kv_calibration.divergence import mean_divergence
from optgptq.kv_calibration.refine import refine_layer
from optgptq.kv_calibration.search import search_layer
from optgptq.kv_calibration.settings import CacheCalibrationSettings
from optgptq.kv_calibration.statistics import measure_layer
from optgptq.models.attention import attention_context
from optgptq.models.loading import load_embedding, load_head
from optgptq.models.spec import DecoderSpec

_NOTHING = LayerParameters(keys=SideParameters(), values=SideParameters())
_EXACT = LayerQuantizer(keys=None, values=None)


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
    source: TensorSource,
    spec: DecoderSpec,
    settings: CacheCalibrationSettings,
    windows: Windows,
    *,
    dtype: torch.dtype,
    device: torch.device,
    layer_of: LayerOf,
    layer_started: Callable[[int], None],
) -> CalibratedCache:
    """Return the scheme and the parameters of a cache.

    Args:
        source: embedding and head of the model are read from it.
        spec: the model.
        settings: what is asked for.
        windows: calibration text; the last ones choose among candidates and are in no statistic.
        dtype: of activations.
        device: where it runs.
        layer_of: reads decoder layer `index`, with the weights that the cache will run beside.
        layer_started: called with the index of each layer; twice where bits are allocated.

    Raises:
        RecipeError: fewer than two windows.
        NumericalError: activations are not finite.
    """
    start = _start(source, spec, settings, windows, dtype=dtype, device=device)
    schemes, record = settings.schemes, dict[str, Any]()
    if settings.budget_bits is not None:
        chains = Chains.start(copied(start), layer_of, num_layers=spec.num_layers, past=settings.past)
        schemes, record["allocation"] = allocate_bits(chains, spec, settings, layer_started=layer_started)
    chains = Chains.start(start, layer_of, num_layers=spec.num_layers, past=settings.past)
    found: list[LayerParameters] = []
    records: list[dict[str, Any]] = []
    for index, scheme in enumerate(schemes):
        layer_started(index)
        parameters, layer_record = _layer(chains, scheme, settings, device=device)
        found.append(parameters)
        records.append({"index": index, **layer_record})
    head = load_head(source, spec, dtype=dtype, device=device)
    calibrated, plain = (
        mean_divergence(head, chains.ahead[0], hidden, [batch.valid_BS for batch in chains.held_out])
        for hidden in ([batch.state.hidden_BSM for batch in chains.held_out], chains.plain)
    )
    record |= {"layers": records, "held_out_kl": calibrated, "held_out_kl_plain": plain}
    record["is_plain"] = calibrated > plain
    if calibrated > plain:
        found = [_NOTHING] * spec.num_layers
        # What is told of the cache is told of the one that is written.
        record |= {"held_out_kl": plain, "held_out_kl_discarded": calibrated}
    return CalibratedCache(scheme=CacheScheme(layers=schemes, past=settings.past), layers=tuple(found), record=record)


def _start(
    source: TensorSource,
    spec: DecoderSpec,
    settings: CacheCalibrationSettings,
    windows: Windows,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> ActivationStream:
    if windows.num_windows < 2:
        raise RecipeError(
            "calibration.num_windows",
            expected="at least 2 windows: one to measure on, one to choose with",
            found=str(windows.num_windows),
            action="Set calibration.num_windows to 2 or more, or name a longer text.",
        )
    held_out = min(max(round(windows.num_windows * settings.held_out_share), 1), windows.num_windows - 1)
    context = attention_context(spec, windows.window_size, dtype=dtype, device=device)
    embedding = load_embedding(source, spec, dtype=dtype, device=device)
    return embed(windows, embedding, context, windows_per_batch=None, num_held_out=held_out)


def _layer(
    chains: Chains, scheme: LayerScheme, settings: CacheCalibrationSettings, *, device: torch.device
) -> tuple[LayerParameters, dict[str, Any]]:
    if scheme.is_exact:
        chains.advance(_EXACT, _EXACT)
        return _NOTHING, {"key_bits": scheme.keys.bits, "value_bits": scheme.values.bits}
    layer, judge = chains.layer(), chains.judge()
    statistics = measure_layer(
        chains.stream, layer, settings.past, reservoir_tokens=settings.reservoir_tokens, seed=settings.seed
    )
    found = search_layer(judge, statistics, scheme, settings)
    if settings.refine == "gradient":
        found = refine_layer(judge, chains.stream, statistics, scheme, found)
    chains.advance(found.quantizer, LayerQuantizer.of(scheme, _NOTHING, device))
    record = found.record(scheme) | {
        "key_maximum": statistics.key_maximum_K.tolist(),
        "value_maximum": statistics.value_maximum_K.tolist(),
        "sinks": list(statistics.sinks),
    }
    cpu = torch.device("cpu")
    parameters = LayerParameters(
        keys=on_device(found.parameters.keys, cpu), values=on_device(found.parameters.values, cpu)
    )
    return parameters, record
