"""A quantized KV cache as a checkpoint holds it: a key of config.json and a file of parameters, read, written, made up.

Format: `docs/formats/kv-cache.md`. Shapes: `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optgptq.checkpoint.disk import disk_error
from optgptq.checkpoint.folder import CONFIG_FILE, CheckpointFolder
from optgptq.errors import FormatError, UsageError
from optgptq.formats.checkpoint import with_config_key
from optgptq.formats.kv_cache_content import cache_content
from optgptq.formats.kv_cache_keys import (
    CACHE_KEY,
    PARAMS_FILE,
    CacheKeys,
    LayerKeys,
    parse_cache_keys,
)
from optgptq.formats.kv_cache_sidecar import CacheSizes, read_sidecar, require_sidecar, write_sidecar
from optgptq.kv_cache.hadamard import block_hadamard
from optgptq.kv_cache.page_layout import require_head_size
from optgptq.kv_cache.rotary_pairs import RotaryPairs
from optgptq.kv_cache.scheme import CODE_BITS, CacheScheme, LayerScheme, PastRule, SideScheme
from optgptq.kv_cache.setup import CacheSetup, LayerParameters, SideParameters


def read_cache_setup(
    folder: CheckpointFolder,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    pairs: Sequence[RotaryPairs | None] = (),
) -> CacheSetup | None:
    """Return the quantized cache that a checkpoint asks for, None where its config.json has no such key.

    Args:
        folder: the checkpoint.
        num_layers, num_kv_heads, head_dim: of its model.
        pairs: rotary pairs of each decoder layer, None for a layer without; empty where they are not to be checked.

    Raises:
        FormatError: another version or method, a file of parameters that is missing, changed or does not fit.
    """
    if CACHE_KEY not in folder.config:
        return None
    content, where = folder.config[CACHE_KEY], f"{folder.path}, {CACHE_KEY}"
    keys = parse_cache_keys(content, where=where, num_layers=num_layers, head_dim=head_dim)
    path = require_sidecar(folder.path, keys.params_file, keys.params_sha256)
    sizes = CacheSizes(num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim)
    stored = read_sidecar(path, sizes, pairs=pairs)
    layers = [
        _layer_parameters(said, found, sizes, where=f"{path}, layers.{index}")
        for index, (said, found) in enumerate(zip(keys.layers, stored, strict=True))
    ]
    return CacheSetup(
        scheme=keys.scheme, layers=tuple(layers), fingerprint=_fingerprint(content), source=str(folder.path)
    )


def read_cache_keys(folder: CheckpointFolder, *, num_layers: int, head_dim: int) -> CacheKeys | None:
    """Return what config.json says of a quantized cache, its parameters not looked at; None where it says nothing.

    Raises:
        FormatError: as `read_cache_setup`, for what is in config.json.
    """
    if CACHE_KEY not in folder.config:
        return None
    where = f"{folder.path}, {CACHE_KEY}"
    return parse_cache_keys(folder.config[CACHE_KEY], where=where, num_layers=num_layers, head_dim=head_dim)


def write_cache_setup(
    folder: Path,
    scheme: CacheScheme,
    layers: Sequence[LayerParameters],
    *,
    folded: Mapping[str, Any],
    calibration: Mapping[str, Any],
) -> None:
    """Write the file of parameters into checkpoint `folder` and the key into its config.json, which must be there.

    A rotation that `block_hadamard` gives is named and not stored. The same arguments give the same bytes.

    Args:
        folder: a checkpoint, complete but for its manifest.
        scheme: what is stored.
        layers: parameters of each decoder layer.
        folded: what was moved into the weights: `k_scale`, `v_rotation`, `k_norm_gain`. JSON, as `calibration`.
        calibration: where the parameters come from.

    Raises:
        CapacityError, OutputError: a file cannot be written.
    """
    transforms = [(_transform_name(layer.keys), _transform_name(layer.values)) for layer in layers]
    stored = [LayerParameters(keys=_without_named(layer.keys), values=_without_named(layer.values)) for layer in layers]
    digest = write_sidecar(folder / PARAMS_FILE, stored)
    content = cache_content(scheme, transforms, params_sha256=digest, folded=folded, calibration=calibration)
    write_cache_key(folder, content)


def data_free_setup(bits: int, *, num_layers: int, num_kv_heads: int, head_dim: int, past: PastRule) -> CacheSetup:
    """Return a cache that needs no calibration: keys and values of every layer rotated by `block_hadamard`, one group
    for a head.

    Raises:
        UsageError: bits that are none of a code, or heads that do not split.
    """
    if bits not in CODE_BITS:
        known = ", ".join(str(known) for known in CODE_BITS)
        raise UsageError("kv_cache", expected=f"one of {known}", found=str(bits), action="Choose one of these widths.")
    action = "Leave the KV cache of this model as it is: kv_cache 16."
    require_head_size(head_dim, error=UsageError, where="kv_cache", action=action)
    side = SideScheme(bits=bits, group_size=head_dim)
    rotation = SideParameters(rotation_KDD=_hadamard(num_kv_heads, head_dim))
    said = ["data-free", bits, num_layers, num_kv_heads, head_dim, past.name, past.sink_tokens, past.recent_tokens]
    return CacheSetup(
        scheme=CacheScheme(layers=(LayerScheme(keys=side, values=side),) * num_layers, past=past),
        layers=(LayerParameters(keys=rotation, values=rotation),) * num_layers,
        fingerprint=_fingerprint(said),
        source=f"{bits} bits without calibration",
    )


def write_cache_key(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the key alone into config.json of checkpoint `folder`; CapacityError or OutputError where that fails."""
    path = folder / CONFIG_FILE
    text = with_config_key(path.read_text(encoding="utf-8-sig"), CACHE_KEY, content)
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise disk_error(path, error) from error


def _layer_parameters(said: LayerKeys, found: LayerParameters, sizes: CacheSizes, *, where: str) -> LayerParameters:
    if said.is_skipped:
        return LayerParameters(keys=SideParameters(), values=SideParameters())
    (key_transform, value_transform), (key_clip, value_clip) = said.transforms, said.clips
    return LayerParameters(
        keys=_side_parameters(found.keys, key_transform, key_clip, sizes, where=f"{where}.k"),
        values=_side_parameters(found.values, value_transform, value_clip, sizes, where=f"{where}.v"),
    )


def _side_parameters(
    found: SideParameters, transform: str, clip: float, sizes: CacheSizes, *, where: str
) -> SideParameters:
    """Return what is stored, completed by what config.json names; FormatError where the two contradict each other."""
    moves = found.shift_KD is not None or found.scale_KD is not None
    rotates = found.rotation_KDD is not None
    if (transform == "none" and (moves or rotates)) or (transform == "shift_scale" and rotates):
        raise _contradiction(where, transform, "parameters of another one")
    if transform == "matrix" and not rotates:
        raise _contradiction(where, transform, "no rotation")
    if transform == "hadamard" and not rotates:
        found = replace(found, rotation_KDD=_hadamard(sizes.num_kv_heads, sizes.head_dim))
    if clip < 1 and found.ranges_C2 is None:
        found = replace(found, ranges_C2=torch.full((1, 2), clip))
    return found


def _contradiction(where: str, transform: str, found: str) -> FormatError:
    return FormatError(
        where,
        expected=f"parameters of the transform {transform!r}, which config.json names",
        found=found,
        action="Copy or download the checkpoint again, or pass --kv-cache 4 for a cache that needs no such file.",
    )


def _transform_name(side: SideParameters) -> str:
    if side.rotation_KDD is not None:
        return "hadamard" if _is_hadamard(side.rotation_KDD) else "matrix"
    return "none" if side.shift_KD is None and side.scale_KD is None else "shift_scale"


def _without_named(side: SideParameters) -> SideParameters:
    is_named = side.rotation_KDD is not None and _is_hadamard(side.rotation_KDD)
    return replace(side, rotation_KDD=None) if is_named else side


def _is_hadamard(rotation_KDD: torch.Tensor) -> bool:
    return torch.equal(rotation_KDD.cpu().float(), _hadamard(rotation_KDD.shape[0], rotation_KDD.shape[-1]))


def _hadamard(num_kv_heads: int, head_dim: int) -> torch.Tensor:
    return block_hadamard(head_dim).expand(num_kv_heads, -1, -1)


def _fingerprint(content: object) -> bytes:
    """Return the SHA-256 of canonical JSON; the parameters are in it by their own SHA-256."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).digest()
