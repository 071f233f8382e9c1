"""Activations of both streams written to the journal between two decoder layers, where that costs little.

A job that goes on reads the newest of them in place of running every finished layer again. Both ways give the same
bits.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

from optgptq.calibration.layer import LayerCalibration
from optgptq.calibration.stream import Batch
from optgptq.errors import CapacityError
from optgptq.journal.store import Journal
from optgptq.models.layer import LayerState

# Of the time that the job has taken: what spilling may take in all.
SPILL_SHARE = 0.03
# Bytes per second that a disk is taken to write before one was measured.
_FIRST_GUESS = 200e6
# Bytes that a spill leaves free on the disk.
_LEFT_FREE_BYTES = 2 * 2**30
_PREFIX = "stream-"


class Spills:
    """Activations in a journal, one spill at a time.

    Args:
        journal: where they go.
        share: of the time since now that they may take; 0 for none at all.
    """

    def __init__(self, journal: Journal, *, share: float = SPILL_SHARE) -> None:
        self._journal = journal
        self._share = share
        self._began = time.perf_counter()
        self._seconds = 0.0
        self._bytes = 0

    def keep(self, index: int, calibration: LayerCalibration) -> None:
        """Write the streams behind decoder layer `index`, if that is cheap, and then drop the older spill."""
        num_bytes = sum(_num_bytes(batch) for _, batch in _batches(calibration))
        if not self._is_cheap(num_bytes):
            return
        began = time.perf_counter()
        name = _name(index)
        older = [old for old in self._journal.names(_PREFIX) if old.partition(".")[0] != name]
        try:
            for key, batch in _batches(calibration):
                self._journal.put(f"{name}.{key}", {"hidden_BSM": batch.state.hidden_BSM}, {})
            self._journal.put(name, {}, _shape(calibration))
            self._journal.sync()
        except CapacityError:
            # It only saves time: the job goes on without it, and asks no more.
            self._share = 0.0
            older = self._journal.names(name)
        for old in older:
            self._journal.forget(old)
        self._seconds += time.perf_counter() - began
        self._bytes += num_bytes

    def newest(self, num_finished: int) -> int | None:
        """Return the decoder layer behind which a spill stands, the newest of the first `num_finished`; or None."""
        for index in range(num_finished - 1, -1, -1):
            if self._journal.get(_name(index)) is not None:
                return index
        return None

    def restore(self, index: int, calibration: LayerCalibration) -> bool:
        """Put the streams where the spill behind layer `index` was made; False, and nothing changed, where it is torn.

        `calibration` must have batches of the same sizes.
        """
        known = self._journal.get(_name(index))
        if known is None or known.facts != _shape(calibration):
            return False
        entries = ((batch, self._journal.get(f"{_name(index)}.{key}")) for key, batch in _batches(calibration))
        states = []
        for batch, entry in entries:
            if entry is None:
                return False
            hidden_BSM = entry.tensors["hidden_BSM"].to(batch.kept.device)
            states.append((batch, batch.store.keep(LayerState(hidden_BSM=hidden_BSM))))
        for batch, kept in states:
            batch.kept = kept
        return True

    def _is_cheap(self, num_bytes: int) -> bool:
        if self._share <= 0.0:
            return False
        speed = self._bytes / self._seconds if self._seconds else _FIRST_GUESS
        elapsed = time.perf_counter() - self._began
        if self._seconds + num_bytes / speed > self._share * elapsed:
            return False
        return shutil.disk_usage(self._journal.path).free > num_bytes + _LEFT_FREE_BYTES


def _name(index: int) -> str:
    return f"{_PREFIX}{index:05d}"


def _batches(calibration: LayerCalibration) -> Iterator[tuple[str, Batch]]:
    for number, batch in enumerate(calibration.quantized.batches):
        yield f"quantized-{number:05d}", batch
    if calibration.full_precision is not None:
        for number, batch in enumerate(calibration.full_precision.batches):
            yield f"full_precision-{number:05d}", batch


def _shape(calibration: LayerCalibration) -> dict[str, Any]:
    return {key: [batch.first_window, *batch.kept.shape] for key, batch in _batches(calibration)}


def _num_bytes(batch: Batch) -> int:
    return batch.kept.shape.numel() * batch.kept.dtype.itemsize
