"""What the jobs need of a checkpoint that they read: a folder on disk, or a view of one whose tensors are computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from optgptq.checkpoint.safetensors_header import TensorInfo


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
