"""What a terminal needs to know of a running job, kept from its events; no terminal code here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from .output import human_bytes, human_seconds
from .repeats import PhaseLines, WarningLines

if TYPE_CHECKING:
    from optgptq.reports.events import CacheFound, DecoderLayerFinished, HeadsGrouped, LinearFinished, ProgressEvent

_LINEARS_SHOWN = 8


class JobProgress:
    """Folds events into the figures of a display, and warnings that are like each other into a count.

    Attributes:
        title: what the job does; empty before it started.
        phase: what happens now, in words.
        num_decoder_layers: decoder layers in all; 0 before the job started.
        num_finished: decoder layers that are done.
        recent: the linears solved last, the newest at the end.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, folds_warnings: bool = True) -> None:
        self._clock = clock
        self._began = clock()
        self._layers_began: float | None = None
        self._layer_linears: list[LinearFinished] = []
        self._warnings = WarningLines(folds_warnings)
        self._phases = PhaseLines()
        self.title = ""
        self.phase = ""
        self.num_decoder_layers = 0
        self.num_finished = 0
        self._num_kept = 0
        self.recent: deque[LinearFinished] = deque(maxlen=_LINEARS_SHOWN)

    def update(self, event: ProgressEvent) -> tuple[str, ...]:
        """Take an event in; return the lines that a plain display prints for it, none for most events."""
        from optgptq.reports import events

        match event:
            case events.JobStarted():
                self.title, self.num_decoder_layers = event.title, event.num_decoder_layers
                if not event.num_linears:
                    return (event.title,)
                return (f"{event.title}: {event.num_linears} linears in {event.num_decoder_layers} decoder layers",)
            case events.PhaseStarted():
                self.phase = f"{event.name}: {event.detail}" if event.detail else event.name
                told = self._phases.is_told(event.name, event.detail)
                return (f"[{self.elapsed()}] {self.phase}",) if told else ()
            case events.DecoderLayersKept():
                self.num_finished = self._num_kept = event.num_decoder_layers
                return ()
            case events.DecoderLayerStarted():
                self._layers_began = self._clock() if self._layers_began is None else self._layers_began
                self._layer_linears = []
                self.phase = f"decoder layer {event.index + 1}"
                return ()
            case events.StageStarted():
                self.phase = f"decoder layer {event.layer_index + 1}, {event.stage}"
                return ()
            case events.LinearFinished():
                self._layer_linears.append(event)
                self.recent.append(event)
                return ()
            case events.DecoderLayerFinished():
                self.num_finished += 1
                return (self._layer_line(event),)
            case events.HeadsGrouped():
                return (f"[{self.elapsed()}] {_heads_line(event)}",)
            case events.CacheFound():
                return (f"[{self.elapsed()}] {_cache_line(event)}",)
            case events.WarningRaised():
                return self.warn(event.message)

    def warn(self, message: str) -> tuple[str, ...]:
        """Return the line for a warning; none for one that was told before, or that is like one that was."""
        return self._warnings.add(message)

    def rest(self) -> tuple[str, ...]:
        """Return the lines that are due at the end: how many warnings were not told, by kind."""
        return self._warnings.take_rest()

    def elapsed(self) -> str:
        """Return the time since the start."""
        return human_seconds(self._clock() - self._began)

    def seconds_left(self) -> float | None:
        """Return the expected time for the remaining decoder layers; None before this run has finished one."""
        fresh = self.num_finished - self._num_kept
        if self._layers_began is None or fresh < 1:
            return None
        left = max(self.num_decoder_layers - self.num_finished, 0)
        return (self._clock() - self._layers_began) / fresh * left

    def _layer_line(self, event: DecoderLayerFinished) -> str:
        quantized = [linear for linear in self._layer_linears if linear.loss is not None]
        parts = [f"decoder layer {event.index + 1}/{self.num_decoder_layers}", f"{len(quantized)} linears"]
        dense = len(self._layer_linears) - len(quantized)
        if dense:
            parts.append(f"{dense} left dense")
        if quantized:
            loss = sum(linear.loss or 0.0 for linear in quantized) / len(quantized)
            rounded = sum(linear.rtn_loss or 0.0 for linear in quantized) / len(quantized)
            parts.append(f"mean loss {loss:.3e} (rounding {rounded:.3e})")
        if event.output_error is not None:
            parts.append(f"output error {event.output_error:.3e}")
        parts.append(human_seconds(event.seconds))
        parts.append(f"peak {human_bytes(event.peak_memory_bytes)}")
        left = self.seconds_left()
        if left:
            parts.append(f"{human_seconds(left)} left")
        return ", ".join(parts)


def _heads_line(event: HeadsGrouped) -> str:
    ratio = event.perplexity_after / event.perplexity_before
    return (
        f"{event.num_kv_heads_before} to {event.num_kv_heads_after} key/value heads, "
        f"{event.kv_bytes_per_token_before:,} to {event.kv_bytes_per_token_after:,} bytes per token, perplexity "
        f"{event.perplexity_before:.4f} to {event.perplexity_after:.4f} ({ratio:.3f} times) on {event.measured_on}"
    )


def _cache_line(event: CacheFound) -> str:
    return (
        f"KV cache of {event.key_bits:.3f} bits per key and {event.value_bits:.3f} per value, "
        f"{event.bytes_per_token:,.0f} bytes per token in place of {event.exact_bytes_per_token:,.0f}"
    )
