"""Activations in one file without a name, which is gone when the process ends, however it ends.

Tensors are read and written as they are, by plain system calls. A mapping of the file would count as resident memory as
long as it stands; what the system caches of a file does not, and it gives that memory to whoever asks.

Shapes: `B` windows of a batch, `S` positions, `M` model width, `I` width of a tensor of the state.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import torch

from optgptq.calibration.extents import Extents
from optgptq.calibration.states import ActivationStore, KeptState, MemoryStore
from optgptq.checkpoint.disk import disk_error
from optgptq.models.layer import LayerState

Activations = Literal["memory", "disk"]
"""Where activations are kept between two stages."""

# Blocks begin at pages of the system's cache.
_BLOCK_BYTES = 4096


@dataclass(slots=True, eq=False, weakref_slot=True)
class _TensorOnDisk:
    """A block of the file, given back when nothing refers to this object any more.

    `seen` is the tensor that was written or read last, as long as somebody has it.
    """

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    seen: weakref.ref[torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _StateOnDisk:
    store: DiskStore
    hidden: _TensorOnDisk
    heads: _TensorOnDisk | None
    attention: _TensorOnDisk | None

    @property
    def shape(self) -> torch.Size:
        return self.hidden.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def read(self) -> LayerState:
        read = self.store.read
        return LayerState(
            hidden_BSM=read(self.hidden),
            heads_BSI=None if self.heads is None else read(self.heads),
            attention_BSM=None if self.attention is None else read(self.attention),
        )


@dataclass(slots=True, eq=False)
class DiskStore:
    """Keeps states in a file of `folder`; a context manager that closes it.

    `most_bytes` is the greatest size that the file has had.

    Raises:
        CapacityError, OutputError: the disk is full, or the folder cannot be written.
    """

    folder: Path
    most_bytes: int = field(default=0, init=False)
    _file: IO[bytes] = field(init=False)
    _extents: Extents = field(default_factory=Extents, init=False)
    # Filled by finalizers, which may run in the middle of anything.
    _released: deque[tuple[int, int]] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file's room back; states that are kept cannot be read any more."""
        self._file.close()

    def keep(self, state: LayerState, *, before: KeptState | None = None) -> KeptState:
        """Return `state` kept.

        Raises:
            CapacityError, OutputError: the disk is full, or cannot be written.
        """
        known = before if isinstance(before, _StateOnDisk) and before.store is self else None
        parts = (None, None, None) if known is None else (known.hidden, known.heads, known.attention)
        hidden = self._keep_tensor(state.hidden_BSM, parts[0])
        heads = None if state.heads_BSI is None else self._keep_tensor(state.heads_BSI, parts[1])
        attention = None if state.attention_BSM is None else self._keep_tensor(state.attention_BSM, parts[2])
        return _StateOnDisk(self, hidden, heads, attention)

    def read(self, kept: _TensorOnDisk) -> torch.Tensor:
        """Return a tensor of the file: the one that somebody still has, else read again."""
        seen = kept.seen()
        if seen is not None:
            return seen
        tensor = torch.empty(kept.shape, dtype=kept.dtype)
        view, done = tensor.view(-1).view(torch.uint8).numpy().data, 0
        try:
            while done < len(view):
                count = os.preadv(self._file.fileno(), [view[done:]], kept.offset + done)
                if not count:
                    raise OSError(f"{len(view) - done} bytes are missing")
                done += count
        except OSError as error:
            raise disk_error(self.folder, error) from error
        tensor = tensor.to(kept.device)
        kept.seen = weakref.ref(tensor)
        return tensor

    def _keep_tensor(self, tensor_BSI: torch.Tensor, known: _TensorOnDisk | None) -> _TensorOnDisk:
        if known is not None and known.seen() is tensor_BSI:
            return known
        view = tensor_BSI.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data
        num_bytes = -(-max(len(view), 1) // _BLOCK_BYTES) * _BLOCK_BYTES
        offset, done = self._take(num_bytes), 0
        kept = _TensorOnDisk(offset, tensor_BSI.shape, tensor_BSI.dtype, tensor_BSI.device, weakref.ref(tensor_BSI))
        weakref.finalize(kept, self._released.append, (offset, num_bytes)).atexit = False
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], offset + done)
        except OSError as error:
            raise disk_error(self.folder, error) from error
        return kept

    def _take(self, num_bytes: int) -> int:
        while self._released:
            self._extents.give_back(*self._released.popleft())
        offset = self._extents.take(num_bytes)
        self.most_bytes = max(self.most_bytes, self._extents.end)
        return offset


def open_store(choice: Activations, folder: Path) -> AbstractContextManager[ActivationStore]:
    """Return a store for the activations of one job; `folder` is where a file may be.

    Raises:
        CapacityError, OutputError: the folder cannot be written.
    """
    return DiskStore(folder) if choice == "disk" else nullcontext(MemoryStore())
