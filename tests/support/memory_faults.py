"""A machine whose memory holds a few windows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from optgptq.models.layer import DecoderLayer, LayerState


@contextmanager
def room_for(num_windows: int, monkeypatch: pytest.MonkeyPatch, *, from_layer: int = 0) -> Iterator[list[int]]:
    """While open, decoder layers from `from_layer` on run out of memory with more windows than that.

    Yields the number of windows of each batch that did not fit, as they come.
    """
    whole, refused = DecoderLayer.stage_input, list[int]()

    def limited(layer: DecoderLayer, stage: str, state: LayerState, context: object) -> torch.Tensor:
        if layer.index >= from_layer and state.hidden_BSM.shape[0] > num_windows:
            refused.append(state.hidden_BSM.shape[0])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(layer, stage, state, context)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(DecoderLayer, "stage_input", limited)
        yield refused
