"""A stream whose batches are too large for the memory, in smaller ones.

Shapes: `B` windows of a batch, `S` positions, `M` model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from optgptq.calibration.stream import ActivationStream, Batch
from optgptq.models.layer import LayerState


def with_smaller_batches(stream: ActivationStream, windows_per_batch: int) -> ActivationStream:
    """Return the same windows in batches of at most `windows_per_batch`, for a stream before a decoder layer.

    Every batch is split on its own: windows held out stay apart, and streams that are split alike stay alike. The given
    stream is left as it is; results differ by rounding, as they do between any two sizes of batches.
    """
    batches = [part for batch in stream.batches for part in _split(batch, windows_per_batch)]
    return ActivationStream(batches, stream.context)


def _split(batch: Batch, size: int) -> Iterator[Batch]:
    if batch.num_windows <= size:
        yield replace(batch, kept_input_BSI=None)
        return
    state = batch.state
    if state.heads_BSI is not None or state.attention_BSM is not None:
        raise ValueError("batches can be split before a decoder layer only")
    for first in range(0, batch.num_windows, size):
        valid_BS = None if batch.valid_BS is None else batch.valid_BS[first : first + size]
        yield replace(
            batch,
            first_window=batch.first_window + first,
            valid_BS=None if valid_BS is None or bool(valid_BS.all()) else valid_BS,
            kept=batch.store.keep(LayerState(hidden_BSM=state.hidden_BSM[first : first + size])),
            kept_input_BSI=None,
        )
