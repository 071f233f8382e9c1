"""Where the activations of a batch of windows are kept between two stages: in memory, or in a store.

A kept state is never changed: a stream that moves on keeps a new one, and copies of the stream still have the old.

Shapes: `B` windows of a batch, `S` positions, `M` model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from optgptq.models.layer import LayerState


class KeptState(Protocol):
    """Activations of one batch between two stages; they are kept as long as something refers to them."""

    @property
    def shape(self) -> torch.Size:
        """Of `hidden_BSM`."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of `hidden_BSM`."""
        ...

    @property
    def device(self) -> torch.device:
        """Where `read` puts them."""
        ...

    def read(self) -> LayerState:
        """Return the state as it was given; its tensors are not to be written to."""
        ...


class ActivationStore(Protocol):
    """Keeps states."""

    def keep(self, state: LayerState, *, before: KeptState | None = None) -> KeptState:
        """Return `state` kept.

        `before`, where given, is the one that `state` takes the place of: what both have in common is kept once.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StateInMemory:
    """A state that stays as it is."""

    state: LayerState

    @property
    def shape(self) -> torch.Size:
        """Of `hidden_BSM`."""
        return self.state.hidden_BSM.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of `hidden_BSM`."""
        return self.state.hidden_BSM.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.state.hidden_BSM.device

    def read(self) -> LayerState:
        """Return the state."""
        return self.state


@dataclass(frozen=True, slots=True)
class MemoryStore:
    """Keeps states as they are, on the device that made them."""

    def keep(self, state: LayerState, *, before: KeptState | None = None) -> KeptState:
        """Return `state` kept."""
        del before
        return StateInMemory(state)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ActivationPlace:
    """Where activations are computed, in which dtype, and what keeps them in between."""

    dtype: torch.dtype
    device: torch.device
    store: ActivationStore = field(default_factory=MemoryStore)
