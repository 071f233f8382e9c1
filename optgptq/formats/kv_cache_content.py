"""The object `kv_cache_quantization` of config.json, made from a scheme. Format: `docs/formats/kv-cache.md`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from optgptq.formats.kv_cache_keys import FIXED_LAYER, FIXED_SIDE, PARAMS_FILE, VERSION
from optgptq.kv_cache.page_layout import PAGE_MULTIPLE
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme, SideScheme, granule_of


def cache_content(
    scheme: CacheScheme,
    transforms: Sequence[tuple[str, str]],
    *,
    params_sha256: str,
    folded: Mapping[str, Any],
    calibration: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the object that says `scheme` and the names of the `transforms` of keys and values, one pair per layer."""
    said = [_layer_content(layer, names) for layer, names in zip(scheme.layers, transforms, strict=True)]
    quantized = [index for index, layer in enumerate(scheme.layers) if not layer.is_exact]
    # The commonest, of those the first: equal schemes give equal bytes.
    counts = Counter(repr(said[index]) for index in quantized)
    default = max((said[index] for index in quantized), key=lambda layer: counts[repr(layer)], default=said[0])
    past = scheme.past
    return {
        "version": VERSION,
        "params_file": PARAMS_FILE,
        "params_sha256": params_sha256,
        "default": {**default, **FIXED_LAYER},
        "layers": {str(index): _difference(said[index], default) for index in quantized if said[index] != default},
        "skip_layers": [index for index, layer in enumerate(scheme.layers) if layer.is_exact],
        "sink_tokens": past.sink_tokens,
        "recent_tokens": past.recent_tokens,
        "past_only": past.name,
        "packing": "split",
        "page_tokens_multiple": math.lcm(PAGE_MULTIPLE, granule_of(scheme.layers)),
        "folded": dict(folded),
        "calibration": dict(calibration),
    }


def _layer_content(layer: LayerScheme, transforms: tuple[str, str]) -> dict[str, Any]:
    return {
        "k": _side_content(layer.keys),
        "v": _side_content(layer.values),
        "k_transform": transforms[0],
        "v_transform": transforms[1],
    }


def _side_content(side: SideScheme) -> dict[str, Any]:
    if side.is_exact:
        return {"bits": side.bits}
    return {"bits": side.bits, "axis": side.axis, "group_size": side.group_size, **FIXED_SIDE}


def _difference(said: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `said` that `default` lacks or has otherwise, tables taken apart."""
    different: dict[str, Any] = {}
    for name, value in said.items():
        if isinstance(value, Mapping):
            inner = _difference(value, default.get(name, {}))
            different |= {name: inner} if inner else {}
        elif default.get(name) != value:
            different[name] = value
    return different
