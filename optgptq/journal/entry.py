"""One finished step as one file: named tensors, plain values, and a hash that tells a whole file from a torn one.

The file is a safetensors file whose metadata hold the plain values as JSON (`facts`) and a SHA-256 over them, the names
and the data (`sha256`). It appears under its name by one rename. Written but not yet forced to disk, it survives the
death of the process; after a power cut the hash tells whether it survived that too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optgptq.checkpoint.disk import disk_error
from optgptq.checkpoint.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, build_header, parse_header
from optgptq.errors import ModelError

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What a step left.

    Attributes:
        tensors: by name, on the processor.
        facts: plain values, as JSON has them.
    """

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


def write_entry(path: Path, entry: Entry) -> None:
    """Write `entry` so that `path` is the old file or the whole new one; it is not forced to disk.

    Raises:
        CapacityError: the disk is full.
        OutputError: the file cannot be written.
    """
    names = sorted(entry.tensors, key=lambda name: (-entry.tensors[name].dtype.itemsize, name))
    tensors = {name: entry.tensors[name].detach().cpu().contiguous() for name in names}
    facts = json.dumps(entry.facts, ensure_ascii=False)
    metadata = {"facts": facts, "sha256": _digest(facts, tensors)}
    header = build_header([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()], metadata)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(header)
            for tensor in tensors.values():
                stream.write(_bytes(tensor))
        os.replace(partial, path)
    except OSError as error:
        # The next one writes over what cannot be removed.
        with suppress(OSError):
            partial.unlink()
        raise disk_error(path, error) from error


def read_entry(path: Path) -> Entry | None:
    """Return what the file holds; None where there is no file, or none that is whole and can be read."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if length > MAX_HEADER_BYTES:
                return None
            header = stream.read(length)
            infos = parse_header(header, file=path.name, file_bytes=os.fstat(stream.fileno()).st_size)
            tensors = {}
            for info in infos:
                data = torch.empty(info.num_bytes, dtype=torch.uint8)
                if info.num_bytes and stream.readinto(data.numpy().data) != info.num_bytes:
                    return None
                tensors[info.name] = data.view(info.torch_dtype).reshape(info.shape)
        metadata = json.loads(header)["__metadata__"]
        facts = json.loads(metadata["facts"])
        whole = metadata["sha256"] == _digest(metadata["facts"], tensors)
    except (OSError, ModelError, KeyError, TypeError, ValueError):
        return None
    return Entry(tensors, facts) if whole and isinstance(facts, dict) else None


def has_all_bytes(path: Path) -> bool:
    """Say whether the file is as long as its header says: cheap at any size; a hash alone tells that it is whole."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if length > MAX_HEADER_BYTES:
                return False
            parse_header(stream.read(length), file=path.name, file_bytes=os.fstat(stream.fileno()).st_size)
    except (OSError, ModelError):
        return False
    return True


def _digest(facts: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
