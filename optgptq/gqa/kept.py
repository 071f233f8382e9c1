"""New tensors of attention as steps of a job: kept layer by layer, and read from there ever after.

Nothing else holds them, so whatever is done with a converted model goes on where another process ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

import torch

from optgptq.errors import OutputError
from optgptq.gqa.layer import ConvertedLayer
from optgptq.gqa.plan import GroupingPlan
from optgptq.journal.entry import Entry
from optgptq.journal.store import Steps


@dataclass(slots=True, eq=False)
class KeptHeads:
    """The new tensors of a model; make it with `of`. One decoder layer of them is in memory.

    Attributes:
        steps: where they are; must keep what is put.
        index_of: decoder layer of each tensor, by full name.
    """

    steps: Steps
    index_of: Mapping[str, int]
    _latest: tuple[int, Entry] | None = field(default=None, init=False)

    @classmethod
    def of(cls, plan: GroupingPlan, steps: Steps) -> Self:
        """Return the tensors of a conversion, as far as there are any."""
        names = plan.new_spec.names
        prefixes = {index: names.layer_prefix(index) + "." for index in range(plan.new_spec.num_layers)}
        index_of = {
            entry.name: index
            for index, prefix in prefixes.items()
            for entry in plan.entries
            if entry.name.startswith(prefix)
        }
        return cls(steps, MappingProxyType(index_of))

    def put(self, converted: ConvertedLayer) -> None:
        """Keep a converted layer, whatever happens from here on.

        Raises:
            CapacityError, OutputError: it cannot be written.
        """
        self.steps.put(_name(converted.layer.index), converted.tensors, {"record": converted.record})
        self.steps.sync()

    def layer(self, index: int) -> Entry | None:
        """Return tensors and record of a decoder layer; None where it was not converted, or not kept whole."""
        return self.steps.get(_name(index))

    def read(self, name: str) -> torch.Tensor:
        """Return tensor `name` on the CPU, in memory of its own.

        Raises:
            OutputError: what was kept is damaged.
        """
        index = self.index_of[name]
        if self._latest is None or self._latest[0] != index:
            entry = self.layer(index)
            if entry is None or name not in entry.tensors:
                raise OutputError(
                    f"journal, grouped heads of decoder layer {index}",
                    expected="the tensors that were put there",
                    found="none, or a damaged file",
                    action="Check the disk, and start the job from its beginning.",
                )
            self._latest = index, entry
        return self._latest[1].tensors[name].clone()

    def read_chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[torch.Tensor]:
        """Yield the bytes of tensor `name` as uint8 tensors of `chunk_bytes`, the last one shorter."""
        yield from torch.split(self.read(name).reshape(-1).view(torch.uint8), chunk_bytes)


def _name(index: int) -> str:
    return f"layer-{index:05d}"
