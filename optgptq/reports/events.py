"""What a running job says about its progress: small records handed to one callable, `progress(event)`.

The job knows nothing about terminals; `optgptq_cli.display` turns events into a live view or into plain lines. An event
is never needed for correctness: a job with no listener does the same work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStarted:
    """The model and the recipe are read; nothing is computed yet.

    Attributes:
        title: one line for people, for example `quantize bundled:story-llama with gptq-w4`.
        num_decoder_layers: how many `DecoderLayerFinished` will come; 0, as below, where weights stay as they are.
        num_linears: how many `LinearFinished` will come.
    """

    title: str
    num_decoder_layers: int
    num_linears: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStarted:
    """A step of the job outside the decoder layers begins, for example `writing calibration text` or `verifying`."""

    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayersKept:
    """An earlier run of the job has finished decoder layers; no `DecoderLayerFinished` comes for them.

    Attributes:
        num_decoder_layers: how many.
    """

    num_decoder_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayerStarted:
    """Decoder layer `index` (from 0) is being read."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted:
    """A stage of the current decoder layer begins: `qkv`, `o`, `gate_up`, `down`, or what the family calls it."""

    layer_index: int
    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFinished:
    """One linear is solved, or left dense on purpose.

    Attributes:
        layer_index: decoder layer, from 0.
        name: full module name.
        out_features: rows.
        in_features: columns.
        bits: bits per code; None when it stays dense.
        loss: relative loss of the solution; None when it stays dense.
        rtn_loss: relative loss of rounding to nearest; None when it stays dense.
        seconds: wall time of the solve.
    """

    layer_index: int
    name: str
    out_features: int
    in_features: int
    bits: int | None
    loss: float | None
    rtn_loss: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayerFinished:
    """A decoder layer is solved and written.

    Attributes:
        index: decoder layer, from 0.
        seconds: wall time since it started.
        output_error: relative error of the layer's output against full precision; None where it is not measured.
        peak_memory_bytes: highest resident memory of the process so far.
    """

    index: int
    seconds: float
    output_error: float | None
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsGrouped:
    """Key/value heads were merged; the rest of the job works on that model.

    Attributes:
        num_kv_heads_before, num_kv_heads_after: of each layer.
        kv_bytes_per_token_before, kv_bytes_per_token_after: keys and values of one token in all layers, 16 bits each.
        perplexity_before, perplexity_after: of the dense model.
        measured_on: the text of the perplexities, in words.
    """

    num_kv_heads_before: int
    num_kv_heads_after: int
    kv_bytes_per_token_before: int
    kv_bytes_per_token_after: int
    perplexity_before: float
    perplexity_after: float
    measured_on: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFound:
    """The parameters of the KV cache are found and written.

    Attributes:
        key_bits, value_bits: of a number on average, its share of scales and minimums included.
        bytes_per_token: codes of one token in all layers.
        exact_bytes_per_token: the same with 16 bits for each number.
    """

    key_bits: float
    value_bits: float
    bytes_per_token: float
    exact_bytes_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WarningRaised:
    """Something that the user must hear about; the same sentence stands in the result."""

    message: str


ProgressEvent = (
    JobStarted
    | PhaseStarted
    | DecoderLayersKept
    | DecoderLayerStarted
    | StageStarted
    | LinearFinished
    | DecoderLayerFinished
    | HeadsGrouped
    | CacheFound
    | WarningRaised
)
ProgressListener = Callable[[ProgressEvent], None]


def ignore_progress(event: ProgressEvent) -> None:
    """Listen to nothing: what a job uses where the caller gives no listener."""
