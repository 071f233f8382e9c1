"""What the jobs need of a checkpoint that they read: a folder on disk, or a view of one whose tensors are computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from optgptq.checkpoint.safetensors_header import SAFETENSORS_DTYPES, TensorInfo
from optgptq.errors import ModelError


class TensorSource(Protocol):
    """Named tensors, a config and side files, all read-only; `CheckpointFolder` is one.

    `tensors` promises dtype and shape of what `read` returns; where a tensor is stored is the source's own business.
    """

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def side_files(self) -> tuple[str, ...]: ...

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of tensor `name`; ModelError if there is none."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return tensor `name` on the CPU, in the dtype and shape of its record, in memory of its own."""
        ...

    def read_chunks(self, name: str, chunk_bytes: int = ...) -> Iterator[torch.Tensor]:
        """Yield the bytes of tensor `name` as uint8 tensors of `chunk_bytes`, the last one shorter."""
        ...


def tensor_info(source: TensorSource, name: str, *, action: str) -> TensorInfo:
    """Return what is known of tensor `name` of `source`; ModelError with this `action` where there is none."""
    if name not in source.tensors:
        raise ModelError(
            f"{source.path}, tensor {name}",
            expected="a tensor of that name",
            found=f"none among {len(source.tensors)} tensors",
            action=action,
        )
    return source.tensors[name]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplacedTensors:
    """A `TensorSource` of which some tensors have other values, in the dtype and shape that they have in `source`.

    Attributes:
        source: everything else.
        replacements: new tensors by name.
    """

    source: TensorSource
    replacements: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        for name, tensor in self.replacements.items():
            info = self.source.info(name)
            if (tensor.dtype, tuple(tensor.shape)) != (info.torch_dtype, info.shape):
                raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} in the place of {info}")

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    @property
    def side_files(self) -> tuple[str, ...]:
        return self.source.side_files

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of tensor `name`; ModelError if there is none."""
        return self.source.info(name)

    def read(self, name: str) -> torch.Tensor:
        """Return tensor `name` on the CPU, in memory of its own."""
        replacement = self.replacements.get(name)
        return self.source.read(name) if replacement is None else replacement.to("cpu", copy=True)

    def read_chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[torch.Tensor]:
        """Yield the bytes of tensor `name` as uint8 tensors of `chunk_bytes`, the last one shorter."""
        if name not in self.replacements:
            yield from self.source.read_chunks(name, chunk_bytes)
            return
        yield from torch.split(self.read(name).contiguous().reshape(-1).view(torch.uint8), chunk_bytes)


class HeldTensors:
    """A `TensorSource` whose tensors are in memory, without a config and other files.

    Attributes:
        path: where they come from, for messages.
        tensors: dtype and shape of each.
    """

    def __init__(self, path: Path, held: Mapping[str, torch.Tensor]) -> None:
        self.path = path
        self._held = held
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: _info(name, held[name]) for name in sorted(held)}
        )

    @property
    def config(self) -> Mapping[str, Any]:
        return MappingProxyType({})

    @property
    def side_files(self) -> tuple[str, ...]:
        return ()

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of tensor `name`; ModelError if there is none."""
        return tensor_info(self, name, action="Start the job again; report it if it happens twice.")

    def read(self, name: str) -> torch.Tensor:
        """Return tensor `name` on the CPU, in memory of its own."""
        self.info(name)
        return self._held[name].to("cpu", copy=True)

    def read_chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[torch.Tensor]:
        """Yield the bytes of tensor `name` as uint8 tensors of `chunk_bytes`, the last one shorter."""
        yield from torch.split(self.read(name).contiguous().reshape(-1).view(torch.uint8), chunk_bytes)


def _info(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(name, SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape), "", 0, tensor.nbytes)
