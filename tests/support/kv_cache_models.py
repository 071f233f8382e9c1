"""Tiny models whose cache is calibrated, and what is asked of it."""

from __future__ import annotations

from typing import Any

import torch

from optgptq.calibration.states import ActivationStore, MemoryStore
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.kv_cache.scheme import LayerScheme, PastRule, SideScheme
from optgptq.kv_calibration.calibrate import StreamedModel
from optgptq.kv_calibration.chains import LayerOf
from optgptq.kv_calibration.settings import CacheCalibrationSettings
from optgptq.models.loading import load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec

_CPU = torch.device("cpu")


def layers_of(spec: DecoderSpec, *, keys: int = 3, values: int = 3) -> tuple[LayerScheme, ...]:
    """Return the same scheme for every decoder layer, one group for a head."""
    size = spec.head_dim
    scheme = LayerScheme(keys=SideScheme(bits=keys, group_size=size), values=SideScheme(bits=values, group_size=size))
    return (scheme,) * spec.num_layers


def cache_settings(spec: DecoderSpec, **values: Any) -> CacheCalibrationSettings:
    """Return settings with one range and codes of 3 bits where `values` say nothing else."""
    return CacheCalibrationSettings(
        **{"schemes": layers_of(spec), "past": PastRule(mode="token"), "max_ranges": 1, **values}
    )


def streamed(
    folder: CheckpointFolder,
    layer_of: LayerOf | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    store: ActivationStore | None = None,
) -> StreamedModel:
    """Return a dense model, read layer by layer."""
    spec = model_spec(folder)
    return StreamedModel(
        source=folder,
        spec=spec,
        layer_of=layer_of or (lambda index: load_layer(folder, spec, index, dtype=dtype)),
        dtype=dtype,
        device=_CPU,
        store=store or MemoryStore(),
    )
