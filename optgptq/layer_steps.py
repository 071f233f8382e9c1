"""Finished stages and decoder layers as steps of a journal.

`layer-00003.qkv` holds the tensors of a stage's linears as the checkpoint will hold them, and what is told about each.
`layer-00003` is written last: trained norms, scales of an fp8 cache, and what is told about the layer. `head` is the
output head, where it is quantized, behind all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optgptq.checkpoint.source import HeldTensors
from optgptq.errors import OutputError
from optgptq.formats import CheckpointFormat
from optgptq.journal.entry import Entry
from optgptq.journal.store import SESSION_PREFIX, Journal
from optgptq.models.spec import STAGE_NAMES, Place, StageName
from optgptq.plan import LinearPlan
from optgptq.quantized_weight import QuantizedWeight

LAYER_PREFIX = "layer-"
_HEAD = "head"


def layer_name(index: int) -> str:
    """Return the name of the step that ends decoder layer `index`."""
    return f"{LAYER_PREFIX}{index:05d}"


def num_layer_steps(journal: Journal, *, prefix: str = "") -> int:
    """Return how many decoder layers have been ended, by the lengths of the files of all their steps.

    No hash is read, which would take minutes for a large model: what it alone would tell is found by going on.

    Args:
        journal: where they are.
        prefix: before the names of the steps, with a dot.
    """
    begin = f"{prefix}{LAYER_PREFIX}"
    is_whole: dict[str, bool] = {}
    ended = []
    for name in journal.names(begin):
        index, _, part = name.removeprefix(begin).partition(".")
        is_whole[index] = is_whole.get(index, True) and journal.has_all_bytes(name)
        if not part:
            ended.append(index)
    return sum(is_whole[index] for index in ended)


def has_more_than_text(journal: Journal) -> bool:
    """Say whether more was kept than a text, which alone is no reason to refuse a corrected recipe."""
    return any(
        name.partition(".")[0] != "windows" and not name.startswith(SESSION_PREFIX) for name in journal.names("")
    )


@dataclass(frozen=True, slots=True, eq=False)
class LayerSteps:
    """Decoder layers of one job in a journal.

    Attributes:
        journal: where they are.
        form: what encoded their tensors.
        plans: the linears of its decoder layers.
        head: the output head; None where it stays as it is.
    """

    journal: Journal
    form: CheckpointFormat
    plans: Sequence[LinearPlan]
    head: LinearPlan | None = None

    def put_stage(
        self,
        index: int,
        stage: Place,
        tensors: Mapping[str, torch.Tensor],
        linears: Sequence[Mapping[str, Any]],
    ) -> None:
        """Keep a solved stage: encoded tensors by full name, and the facts of its linears in order."""
        self.journal.put(f"{layer_name(index)}.{stage}", tensors, {"linears": list(linears)})

    def put_layer(
        self, index: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], facts: Mapping[str, Any]
    ) -> None:
        """End a decoder layer and force it to disk; `tensors` by kind (`norms`, `scales`) and full name."""
        flat = {f"{kind}/{name}": tensor for kind, part in tensors.items() for name, tensor in part.items()}
        self.journal.put(layer_name(index), flat, facts)
        self.journal.sync()

    def put_head(
        self, tensors: Mapping[str, torch.Tensor], linears: Sequence[Mapping[str, Any]], warnings: Sequence[str]
    ) -> None:
        """Keep the solved head, as `put_stage` keeps a stage, and force it to disk."""
        self.journal.put(_HEAD, tensors, {"linears": list(linears), "warnings": list(warnings)})
        self.journal.sync()

    def stage(self, index: int, stage: StageName) -> Entry | None:
        """Return a solved stage; None where it is not known, or torn."""
        return self.journal.get(f"{layer_name(index)}.{stage}")

    def layer(self, index: int) -> Entry | None:
        """Return the end of a decoder layer; None where it is not known, or torn."""
        return self.journal.get(layer_name(index))

    def is_finished(self, index: int) -> bool:
        """Say whether everything of a decoder layer is known."""
        return self.layer(index) is not None and all(self.stage(index, stage) is not None for stage in STAGE_NAMES)

    def is_head_finished(self) -> bool:
        """Say whether the head is known, or stays as it is."""
        return self.head is None or self.journal.get(_HEAD) is not None

    def known_stages(self, index: int) -> dict[StageName, dict[str, QuantizedWeight]]:
        """Return the quantized weights of the stages that are known, by full name of the linear."""
        entries = {stage: self.stage(index, stage) for stage in STAGE_NAMES}
        return {stage: self._weights(index, entry) for stage, entry in entries.items() if entry is not None}

    def require_stage(self, index: int, stage: StageName) -> Entry:
        """Return a stage that was solved; OutputError where the journal lost it meanwhile."""
        return self._require(self.stage(index, stage), f"{layer_name(index)}.{stage}")

    def require_layer(self, index: int) -> Entry:
        """Return the end of a layer that is finished; OutputError where the journal lost it meanwhile."""
        return self._require(self.layer(index), layer_name(index))

    def require_head(self) -> Entry:
        """Return the head that was solved; OutputError where the journal lost it meanwhile."""
        return self._require(self.journal.get(_HEAD), _HEAD)

    def _weights(self, index: int, entry: Entry) -> dict[str, QuantizedWeight]:
        held = HeldTensors(self.journal.path, entry.tensors)
        solved = {facts["layer"]["name"] for facts in entry.facts["linears"] if "layer" in facts}
        layouts = [plan.layout for plan in self.plans if plan.info.layer_index == index and plan.info.name in solved]
        return {layout.name: self.form.decode(held, layout) for layout in layouts}

    def _require(self, entry: Entry | None, name: str) -> Entry:
        if entry is not None:
            return entry
        raise OutputError(
            f"{self.journal.path}, step {name}",
            expected="the step as it was written",
            found="none, or a damaged file",
            action="Run the same command again: what was lost is solved again. Check the disk if it happens twice.",
        )


def tensors_of(entry: Entry, kind: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one kind that `put_layer` kept, by full name."""
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): tensor for name, tensor in entry.tensors.items() if name.startswith(prefix)}
