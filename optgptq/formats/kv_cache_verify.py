"""Checks of a quantized KV cache in a checkpoint whose model need not be known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import Problem
from optgptq.errors import FormatError
from optgptq.formats.kv_cache_config import read_cache_setup
from optgptq.formats.kv_cache_keys import CACHE_KEY, params_place
from optgptq.formats.kv_cache_sidecar import MAX_HEAD_DIM, MAX_LAYERS, CacheSizes, require_sidecar, stored_sizes
from optgptq.kv_cache.page_layout import CHANNEL_MULTIPLE


def check_cache(folder: CheckpointFolder) -> list[Problem]:
    """Return what is wrong with the cache that a checkpoint asks for: its key, hash, names, shapes and values.

    Sizes are taken from the parameters themselves; whether they are those of the model is checked where it is loaded.
    """
    if CACHE_KEY not in folder.config:
        return []
    content = folder.config[CACHE_KEY]
    try:
        name, digest = params_place(content, where=f"{folder.path}, {CACHE_KEY}")
        sizes = stored_sizes(require_sidecar(folder.path, name, digest))
        sizes = _with_layers(content, sizes or _sizes_of_groups(content))
        read_cache_setup(folder, num_layers=sizes.num_layers, num_kv_heads=sizes.num_kv_heads, head_dim=sizes.head_dim)
    except FormatError as error:
        return [Problem(error.where, error.expected, error.found)]
    return []


def cache_file(folder: CheckpointFolder) -> str | None:
    """Return the name of the file of parameters, None where there is none or nothing to find it by."""
    content = folder.config.get(CACHE_KEY)
    name = content.get("params_file") if isinstance(content, Mapping) else None
    return name if isinstance(name, str) else None


def _with_layers(content: Mapping[str, Any], sizes: CacheSizes) -> CacheSizes:
    """Return `sizes` with the decoder layers that config.json speaks of."""
    layers, skipped = content.get("layers"), content.get("skip_layers")
    named = [int(name) for name in layers if name.isascii() and name.isdecimal()] if isinstance(layers, dict) else []
    named += [index for index in skipped if isinstance(index, int)] if isinstance(skipped, list) else []
    return CacheSizes(
        num_layers=min(max(sizes.num_layers, 1, *(index + 1 for index in named)), MAX_LAYERS),
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
    )


def _sizes_of_groups(content: Mapping[str, Any]) -> CacheSizes:
    """Return sizes that every group along channels divides, for a cache without parameters."""
    default = content.get("default")
    sides = [default.get(side) for side in ("k", "v")] if isinstance(default, Mapping) else []
    layers = content.get("layers")
    for layer in layers.values() if isinstance(layers, Mapping) else ():
        sides += [layer.get(side) for side in ("k", "v")] if isinstance(layer, Mapping) else []
    groups = [side.get("group_size") for side in sides if isinstance(side, Mapping) and side.get("axis") != "token"]
    known = [size for size in groups if isinstance(size, int) and size > 0]
    head_dim = math.lcm(CHANNEL_MULTIPLE, *known)
    return CacheSizes(num_layers=1, num_kv_heads=1, head_dim=head_dim if head_dim <= MAX_HEAD_DIM else CHANNEL_MULTIPLE)
