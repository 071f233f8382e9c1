"""Activations of the calibration windows on their way through the model, one decoder layer at a time.

Shapes: `W` windows, `B` windows of a batch, `S` positions, `M` model width, `I` input columns of a stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from optgptq.calibration.moments import InputMoment
from optgptq.calibration.states import ActivationStore, KeptState, MemoryStore
from optgptq.data.windows import Windows
from optgptq.errors import NumericalError
from optgptq.models.attention import AttentionContext
from optgptq.models.ends import Embedding
from optgptq.models.layer import DecoderLayer, LayerState
from optgptq.models.spec import StageName

# Tokens per forward pass where the recipe names no batch: enough for the matrix units, little against the streams.
TOKENS_PER_BATCH = 4096
# Inputs of the widest stage are kept for the next pass where all of them fit, else computed twice.
KEPT_BYTES = 256 * 2**20


@dataclass(slots=True, eq=False)
class Batch:
    """Windows that run together.

    Attributes:
        first_window: index of the first of them among all windows.
        valid_BS: bool, False at padding; None where no window is padded.
        kept: activations between two stages, wherever they are; `state` reads them.
        store: where activations are kept.
        held_out: these windows choose among solutions and count in no moment.
        kept_input_BSI: inputs of the stage that was measured last, where they were kept.
    """

    first_window: int
    valid_BS: torch.Tensor | None
    kept: KeptState
    store: ActivationStore
    held_out: bool = False
    kept_input_BSI: torch.Tensor | None = None

    @property
    def state(self) -> LayerState:
        """Activations between two stages; may be read from a disk each time, and are not to be written to."""
        return self.kept.read()

    @state.setter
    def state(self, state: LayerState) -> None:
        self.kept = self.store.keep(state, before=self.kept)

    @property
    def num_windows(self) -> int:
        """Windows of this batch."""
        return self.kept.shape[0]


@dataclass(slots=True, eq=False)
class ActivationStream:
    """All windows at the same place in the model.

    Attributes:
        batches: the windows in order.
        context: positions and masks, the same for every batch.
    """

    batches: list[Batch]
    context: AttentionContext
    kept_bytes: int = field(default=0, init=False)

    @property
    def device(self) -> torch.device:
        """Where activations are when they are computed with."""
        return self.batches[0].kept.device

    @property
    def window_size(self) -> int:
        """Positions of a window."""
        return self.batches[0].kept.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.batches[0].kept.dtype

    def snapshot(self) -> ActivationStream:
        """Return a stream at the same place that moves on its own; no activation is copied."""
        return ActivationStream([replace(batch, kept_input_BSI=None) for batch in self.batches], self.context)

    def measure(
        self, layer: DecoderLayer, stage: StageName, moment: InputMoment, *, reads: str, keep: bool = False
    ) -> None:
        """Add the inputs of `stage` to `moment`.

        Args:
            layer: where the stream stands.
            stage: stage that comes next.
            moment: to add to.
            reads: full name of a linear of the stage, for the message when a value is not finite.
            keep: keep the inputs for `advance` where they fit; for inputs that are dear to compute.
        """
        for batch in self.batches:
            inputs_BSI = layer.stage_input(stage, batch.state, self.context)
            if not batch.held_out:
                add_inputs(moment, inputs_BSI, batch, reads=reads)
            if keep:
                self.keep(batch, inputs_BSI)

    def keep(self, batch: Batch, inputs_BSI: torch.Tensor) -> None:
        """Keep the inputs of a stage for `advance` where there is room."""
        if self.kept_bytes + inputs_BSI.nbytes <= KEPT_BYTES:
            self.kept_bytes += inputs_BSI.nbytes
            batch.kept_input_BSI = inputs_BSI

    def advance(self, layer: DecoderLayer, stage: StageName) -> None:
        """Apply the linears of `stage` to every batch."""
        if stage == "gate_up":
            # Its output is made again in `down`: nothing to read or write for.
            return
        for batch in self.batches:
            batch.state = layer.advance(stage, batch.state, self.context, stage_input_BSI=batch.kept_input_BSI)
            batch.kept_input_BSI = None
        self.kept_bytes = 0

    def measure_whole_layer(
        self, layer: DecoderLayer, moments: dict[StageName, InputMoment], *, reads: dict[StageName, str]
    ) -> None:
        """Add the inputs of every stage in one pass that leaves the stream where it stands."""
        for batch in self.batches:
            state = batch.state
            for stage, moment in moments.items():
                inputs_BSI = layer.stage_input(stage, state, self.context)
                if not batch.held_out:
                    add_inputs(moment, inputs_BSI, batch, reads=reads[stage])
                state = layer.advance(stage, state, self.context, stage_input_BSI=inputs_BSI)


def add_inputs(moment: InputMoment, inputs_BSI: torch.Tensor, batch: Batch, *, reads: str) -> None:
    """Add a batch to a moment; `reads` is the full name of a linear of the stage, for the message.

    Raises:
        NumericalError: a value is not finite, or its square overflows.
    """
    moment.add(inputs_BSI, batch.valid_BS)
    if not moment.is_finite():
        raise _not_finite(inputs_BSI, batch, reads, dtype=moment.sum_II.dtype)


def embed(
    windows: Windows,
    embedding: Embedding,
    context: AttentionContext,
    *,
    windows_per_batch: int | None,
    num_held_out: int = 0,
    store: ActivationStore | None = None,
) -> ActivationStream:
    """Return the stream of `windows` before the first decoder layer; the last `num_held_out` are in no moment.

    `store` keeps the activations; None for memory.
    """
    size = windows_per_batch or default_windows_per_batch(windows.window_size)
    store = store or MemoryStore()
    device = embedding.tokens_VE.device
    positions_S = torch.arange(windows.window_size)
    batches = []
    num_measured = windows.num_windows - num_held_out
    firsts = [*range(0, num_measured, size), *range(num_measured, windows.num_windows, size)]
    for first, end in zip(firsts, [*firsts[1:], windows.num_windows], strict=True):
        tokens_BS = windows.tokens_WS[first:end]
        lengths_B = windows.lengths_W[first:end]
        padded = bool((lengths_B < windows.window_size).any())
        valid_BS = (positions_S < lengths_B[:, None]).to(device) if padded else None
        kept = store.keep(LayerState(hidden_BSM=embedding.embed(tokens_BS.to(device), context)))
        batches.append(Batch(first, valid_BS, kept, store, held_out=first >= num_measured))
    return ActivationStream(batches, context)


def default_windows_per_batch(window_size: int) -> int:
    """Return how many windows run together where the recipe does not say."""
    return max(TOKENS_PER_BATCH // window_size, 1)


def output_error(stream: ActivationStream, reference: ActivationStream) -> float:
    """Return `|h - r|^2 / |r|^2` over the windows of `reference`, which are the first ones of `stream`."""
    difference = energy = 0.0
    windows = zip(_hidden_by_window(reference.batches), _hidden_by_window(stream.batches), strict=False)
    for (expected_SM, valid_S), (found_SM, _) in windows:
        found_SM, expected_SM = found_SM.float(), expected_SM.float()
        if valid_S is not None:
            found_SM, expected_SM = found_SM[valid_S], expected_SM[valid_S]
        difference += float((found_SM - expected_SM).square().sum(dtype=torch.float64))
        energy += float(expected_SM.square().sum(dtype=torch.float64))
    return difference / energy if energy > 0 else 0.0


def _hidden_by_window(batches: Sequence[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    for batch in batches:
        hidden_BSM = batch.state.hidden_BSM
        for row in range(batch.num_windows):
            yield hidden_BSM[row], None if batch.valid_BS is None else batch.valid_BS[row]


def _not_finite(inputs_BSI: torch.Tensor, batch: Batch, reads: str, *, dtype: torch.dtype) -> NumericalError:
    # Squares overflow before the values do, in the dtype of the sum.
    bad_BS = ~torch.isfinite(inputs_BSI.to(dtype).square()).all(dim=-1)
    if batch.valid_BS is not None:
        bad_BS &= batch.valid_BS
    bad_B = bad_BS.any(dim=1).nonzero().flatten().tolist()
    window = batch.first_window + (bad_B[0] if bad_B else 0)
    return NumericalError(
        f"input of {reads}, calibration window {window}",
        expected="finite activations",
        found=f"NaN, infinity or a square beyond {str(dtype).removeprefix('torch.')}",
        action="Check the model's weights with `optgptq verify`; calibration.compute_dtype=float32 avoids overflow.",
    )
