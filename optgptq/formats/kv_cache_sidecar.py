"""The file of parameters of a quantized KV cache: `kv_cache/kv_params.safetensors`, apart from the weights.

Engines that load every safetensors file of a model folder do not look into sub-folders. Format:
`docs/formats/kv-cache.md`.
Shapes: `K` key/value heads, `D` head dimension, `C` candidate ranges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from optgptq.checkpoint.disk import disk_error
from optgptq.checkpoint.manifest import sha256_file
from optgptq.checkpoint.paths import require_inside
from optgptq.checkpoint.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo, build_header, parse_header
from optgptq.errors import FormatError, ModelError
from optgptq.formats.kv_cache_checks import check_shape, check_values
from optgptq.kv_cache.rotary_pairs import RotaryPairs
from optgptq.kv_cache.setup import LayerParameters, SideParameters

_PREFIX = "layers"
_SIDES = ("k", "v")
# Ending of a tensor's name, and the attribute of `SideParameters` that it holds.
FIELDS: Mapping[str, str] = {
    "shift": "shift_KD",
    "smooth": "scale_KD",
    "rotation": "rotation_KDD",
    "metric": "metric_KDD",
    "ranges": "ranges_C2",
}
# What a file may claim of a model that is not at hand.
MAX_LAYERS = 10_000
MAX_HEAD_DIM = 8192
_ACTION = "Copy or download the checkpoint again, or pass --kv-cache 4 for a cache that needs no such file."


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSizes:
    """What the parameters of a model's cache are as large as."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def sidecar_bytes(layers: Sequence[LayerParameters]) -> bytes:
    """Return the whole file: float32 tensors in name order, the same bytes for the same parameters."""
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        for side, parameters in zip(_SIDES, (layer.keys, layer.values), strict=True):
            for ending, tensor in _parts(parameters).items():
                tensors[f"{_PREFIX}.{index}.{side}_{ending}"] = tensor
    ordered = {name: tensors[name].detach().cpu().float().contiguous() for name in sorted(tensors)}
    header = build_header([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()], {})
    return header + b"".join(tensor.numpy().tobytes() for tensor in ordered.values())


def write_sidecar(path: Path, layers: Sequence[LayerParameters]) -> str:
    """Write the parameters to `path`, its folder made, and return the SHA-256 of the file.

    Raises:
        CapacityError, OutputError: it cannot be written.
    """
    content = sidecar_bytes(layers)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise disk_error(path, error) from error
    return hashlib.sha256(content).hexdigest()


def require_sidecar(folder: Path, name: str, sha256: str) -> Path:
    """Return the path of the file of parameters of checkpoint `folder`, its content compared with `sha256`.

    Raises:
        FormatError: missing, outside the folder, or changed.
    """
    where = f"{folder}, {name}"
    if not (folder / name).exists():
        raise FormatError(where, expected="the parameters of the KV cache", found="no such file", action=_ACTION)
    try:
        path = require_inside(folder, name)
        found = sha256_file(path)
    except ModelError as error:
        raise FormatError(where, expected=error.expected, found=error.found, action=_ACTION) from error
    except OSError as error:
        raise FormatError(where, expected="a file that can be read", found=str(error), action=_ACTION) from error
    if found != sha256:
        raise FormatError(where, expected=f"SHA-256 {sha256}", found=found, action=_ACTION)
    return path


def read_sidecar(
    path: Path, sizes: CacheSizes, *, pairs: Sequence[RotaryPairs | None] = ()
) -> tuple[LayerParameters, ...]:
    """Return the parameters of every decoder layer, float32 on the CPU, None where there are none.

    Args:
        path: the file.
        sizes: of the model.
        pairs: rotary pairs of each decoder layer; empty: they are not known, and scales of keys are not compared.

    Raises:
        FormatError: an unknown name, another dtype or shape, or values that no cache can use.
    """
    sides: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    infos = read_header(path)
    with path.open("rb") as stream:
        for info in infos:
            index, side, ending = _address(info.name, path, sizes.num_layers)
            where = f"{path}, tensor {info.name}"
            check_shape(ending, info, where, num_kv_heads=sizes.num_kv_heads, head_dim=sizes.head_dim)
            stream.seek(info.begin)
            tensor = torch.frombuffer(bytearray(stream.read(info.num_bytes)), dtype=torch.float32).view(info.shape)
            check_values(ending, tensor, where, pairs=pairs[index] if pairs and side == "k" else None)
            if ending == "rotation" and tensor.dim() == 2:
                tensor = tensor.expand(sizes.num_kv_heads, -1, -1)
            sides.setdefault((index, side), {})[FIELDS[ending]] = tensor
    return tuple(
        LayerParameters(
            keys=SideParameters(**sides.get((index, "k"), {})), values=SideParameters(**sides.get((index, "v"), {}))
        )
        for index in range(sizes.num_layers)
    )


def read_header(path: Path) -> list[TensorInfo]:
    """Return the tensors of the file; FormatError when it is no safetensors file."""
    try:
        with path.open("rb") as stream:
            num_bytes = path.stat().st_size
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if length > min(MAX_HEADER_BYTES, num_bytes - LENGTH_BYTES):
                raise FormatError(
                    str(path), expected="a safetensors file", found=f"a header of {length} bytes", action=_ACTION
                )
            return parse_header(stream.read(length), file=str(path), file_bytes=num_bytes)
    except ModelError as error:
        raise FormatError(error.where, expected=error.expected, found=error.found, action=_ACTION) from error
    except OSError as error:
        raise FormatError(str(path), expected="a file that can be read", found=str(error), action=_ACTION) from error


def stored_sizes(path: Path) -> CacheSizes | None:
    """Return the sizes that the tensors of the file have, for checks without the model; None where none tells.

    The number of decoder layers is that of the last one with parameters.
    """
    num_layers, heads = 0, None
    for info in read_header(path):
        parts = info.name.split(".")
        if len(parts) == 3 and parts[1].isascii() and parts[1].isdecimal():
            num_layers = max(num_layers, min(int(parts[1]), MAX_LAYERS - 1) + 1)
        is_square = len(info.shape) == 3 and info.shape[1] == info.shape[2]
        if heads is None and (is_square or info.name.endswith(("_shift", "_smooth"))) and len(info.shape) > 1:
            heads = info.shape[0], info.shape[-1]
    if heads is None or heads[1] > MAX_HEAD_DIM:
        return None
    return CacheSizes(num_layers=num_layers, num_kv_heads=heads[0], head_dim=heads[1])


def _address(name: str, path: Path, num_layers: int) -> tuple[int, str, str]:
    """Return decoder layer, side and ending of `layers.N.k_shift` and the like."""
    parts = name.split(".")
    side, underscore, ending = parts[-1].partition("_")
    number = parts[1] if len(parts) == 3 and parts[0] == _PREFIX else ""
    is_number = number.isascii() and number.isdecimal() and str(int(number)) == number and int(number) < num_layers
    if not (is_number and underscore and side in _SIDES and ending in FIELDS):
        known = ", ".join(FIELDS)
        raise FormatError(
            f"{path}, tensor {name[:200]}",
            expected=f"{_PREFIX}.N.k_... or v_... with N up to {num_layers - 1}, ending in one of {known}",
            found="another name: a method that is not supported",
            action=_ACTION,
        )
    return int(number), side, ending


def _parts(parameters: SideParameters) -> dict[str, torch.Tensor]:
    parts = {
        "shift": parameters.shift_KD,
        "smooth": parameters.scale_KD,
        "rotation": parameters.rotation_KDD,
        "metric": parameters.metric_KDD,
        "ranges": parameters.ranges_C2,
    }
    return {ending: tensor for ending, tensor in parts.items() if tensor is not None}
