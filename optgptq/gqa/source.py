"""A checkpoint seen with its heads grouped: attention from new tensors that a job keeps, the rest from the old one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from optgptq.checkpoint.safetensors_header import TensorInfo
from optgptq.checkpoint.source import TensorSource
from optgptq.gqa.kept import KeptHeads
from optgptq.gqa.plan import GroupingPlan


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GroupedSource:
    """A `TensorSource`; make it with `grouped_source`.

    Attributes:
        source: the model as it is.
        config: the new config.
        tensors: dtype and shape of every tensor of the new model.
        planned: names of the tensors of attention.
        converted: what holds them; None before they were made, when only dtypes and shapes can be asked for.
    """

    source: TensorSource
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    planned: frozenset[str]
    converted: KeptHeads | None

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def side_files(self) -> tuple[str, ...]:
        return self.source.side_files

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of tensor `name`; ModelError if there is none."""
        return self.tensors[name] if name in self.tensors else self.source.info(name)

    def read(self, name: str) -> torch.Tensor:
        """Return tensor `name` on the CPU, in memory of its own."""
        return self._holder(name).read(name)

    def read_chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[torch.Tensor]:
        """Yield the bytes of tensor `name` as uint8 tensors of `chunk_bytes`, the last one shorter."""
        yield from self._holder(name).read_chunks(name, chunk_bytes)

    def _holder(self, name: str) -> TensorSource | KeptHeads:
        if name not in self.planned:
            return self.source
        assert self.converted is not None, f"{name} is read before it was made"
        return self.converted


def grouped_source(source: TensorSource, plan: GroupingPlan, converted: KeptHeads | None = None) -> GroupedSource:
    """Return the view of `source` after the conversion; without `converted`, of what it will be."""
    new = {
        entry.name: replace(source.info(entry.name), shape=entry.shape, file="", begin=0, end=entry.num_bytes)
        for entry in plan.entries
    }
    return GroupedSource(
        source=source,
        config=plan.config,
        tensors=MappingProxyType(dict(sorted({**source.tensors, **new}.items()))),
        planned=frozenset(new),
        converted=converted,
    )
