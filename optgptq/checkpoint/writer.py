"""Safetensors shards written in any order of tensors, with nothing held in memory.

All sizes are known before the first tensor is: shards are planned, their headers written and the files given their
full length at once. Then every tensor goes straight to its place.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from optgptq.checkpoint.disk import disk_error
from optgptq.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from optgptq.checkpoint.safetensors_header import build_header
from optgptq.errors import OptGPTQError

PLAIN_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor that will be written.

    Attributes:
        name: tensor name.
        dtype: dtype in the file.
        shape: shape in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Place:
    entry: TensorEntry
    file: str
    begin: int


class ShardWriter:
    """Writes `entries` to safetensors files in `folder`; every entry must be written once before `finish`.

    Bytes depend on the entries and tensors alone, not on the order of the writes.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[TensorEntry],
        *,
        max_shard_bytes: int,
        metadata: Mapping[str, str] = PLAIN_METADATA,
    ) -> None:
        """Plan the shards and create the files at their full length.

        Raises:
            CapacityError: the disk is full.
            OutputError: the folder cannot be written.
        """
        shards = plan_shards(entries, max_shard_bytes)
        self._folder = folder
        self._places: dict[str, _Place] = {}
        self._written: set[str] = set()
        self.files = _shard_names(len(shards))
        for file, shard in zip(self.files, shards, strict=True):
            header = build_header([(entry.name, entry.dtype, entry.shape) for entry in shard], metadata)
            begin = len(header)
            for entry in shard:
                if entry.name in self._places:
                    raise _misuse(f"tensor {entry.name}", expected="one entry of that name", found="two")
                self._places[entry.name] = _Place(entry, file, begin)
                begin += entry.num_bytes
            self._create(file, header, begin)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write `tensor` (any device, any strides) to the place planned for `name`.

        Raises:
            CapacityError: the disk is full.
            OutputError: the file cannot be written.
        """
        place = self._claim(name)
        entry = place.entry
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise _misuse(
                f"tensor {name}",
                expected=f"{entry.dtype} {list(entry.shape)}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._write_at(place, [data])

    def write_chunks(self, name: str, chunks: Iterable[torch.Tensor]) -> None:
        """Write the bytes of `name` as they come, uint8 tensors one after the other; same errors as `write`."""
        self._write_at(self._claim(name), chunks)

    def finish(self) -> None:
        """Check that every entry was written, force the files to disk and write the index."""
        missing = sorted(self._places.keys() - self._written)
        if missing:
            raise _misuse(
                str(self._folder),
                expected=f"{len(self._places)} tensors written",
                found=f"{len(missing)} missing, the first is {missing[0]}",
            )
        for file in self.files:
            with _open(self._folder / file, os.O_WRONLY) as descriptor:
                os.fsync(descriptor)
        index = {
            "metadata": {"total_size": sum(place.entry.num_bytes for place in self._places.values())},
            "weight_map": {name: self._places[name].file for name in sorted(self._places)},
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        self._create(INDEX_FILE, text.encode(), len(text.encode()))

    def _claim(self, name: str) -> _Place:
        if name not in self._places or name in self._written:
            found = "none of that name was planned" if name not in self._places else "it was written already"
            raise _misuse(f"tensor {name}", expected="a planned tensor, written once", found=found)
        self._written.add(name)
        return self._places[name]

    def _create(self, file: str, content: bytes, num_bytes: int) -> None:
        with _open(self._folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            try:
                _pwrite_all(descriptor, memoryview(content), 0)
                os.ftruncate(descriptor, num_bytes)
            except OSError as error:
                raise disk_error(self._folder / file, error) from error

    def _write_at(self, place: _Place, chunks: Iterable[torch.Tensor]) -> None:
        path = self._folder / place.file
        position, end = place.begin, place.begin + place.entry.num_bytes
        with _open(path, os.O_WRONLY) as descriptor:
            for chunk in chunks:
                if position + chunk.numel() > end:
                    break
                try:
                    _pwrite_all(descriptor, chunk.numpy().data, position)
                except OSError as error:
                    raise disk_error(path, error) from error
                position += chunk.numel()
        if position != end:
            raise _misuse(
                f"tensor {place.entry.name}",
                expected=f"{place.entry.num_bytes} bytes",
                found=f"chunks that stop or overrun at byte {position - place.begin}",
            )


def plan_shards(entries: Sequence[TensorEntry], max_shard_bytes: int) -> list[list[TensorEntry]]:
    """Return the entries of each shard: taken in order, a tensor never split, a shard never empty.

    Within a shard, wide dtypes come first: readers view bytes as the dtype, so offsets must be multiples of its size.
    """
    shards: list[list[TensorEntry]] = [[]]
    used = 0
    for entry in entries:
        if shards[-1] and used + entry.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.num_bytes
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def _shard_names(count: int) -> tuple[str, ...]:
    if count == 1:
        return (SINGLE_FILE,)
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


@contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _pwrite_all(descriptor: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)


def _misuse(where: str, *, expected: str, found: str) -> OptGPTQError:
    return OptGPTQError(where, expected=expected, found=found, action="Please report this: it is a bug in optgptq.")
