"""Decode steps recorded once and replayed: a GPU then waits for no Python between the operations of a step.

A graph is fixed in its shapes, so there is one for each bucket of rows and of context. Rows that are not needed are
filled with tokens that write to and read from the reserved page 0 alone.

Shapes: `R` rows of a bucket, each one token of a text; `P` pages of a row of a table; `V` vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from optgptq.kernels.paged_attention import PagedBatch
from optgptq.runtime.step_batch import StepBatch

logger = logging.getLogger(__name__)

RunStep = Callable[[StepBatch], torch.Tensor]
Replay = Callable[[], torch.Tensor]
Capture = Callable[[Callable[[], torch.Tensor]], Replay]

_FINE_ROWS = 8
_SMALL_ROWS = (1, 2, 4, 8)
_FIRST_CONTEXT = 1024
_CONTEXT_FACTOR = 4
# Runs before a recording: libraries take their work space, kernels are compiled.
_WARM_UP_RUNS = 2


@dataclass(frozen=True, slots=True)
class Bucket:
    """The shapes of a graph: rows, and keys that a row may see."""

    rows: int
    context: int


def bucket_of(num_rows: int, max_context: int, *, max_length: int) -> Bucket:
    """Return the smallest bucket: 1, 2, 4, 8, then multiples of 8; contexts of 1024, times 4 each."""
    rows = next((size for size in _SMALL_ROWS if size >= num_rows), -(-num_rows // _FINE_ROWS) * _FINE_ROWS)
    context = _FIRST_CONTEXT
    while context < max_context:
        context *= _CONTEXT_FACTOR
    return Bucket(rows, min(context, max(max_length, max_context)))


class DeviceRecorder:
    """Records on the current CUDA or HIP device. All graphs share one pool of memory: only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], torch.Tensor]) -> Replay:
        """Record what `run` does; the result of a replay is overwritten by the next one of any graph."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Recorded:
    """A graph and the tensors that it reads."""

    batch: StepBatch
    replay: Replay


@dataclass(slots=True, eq=False, kw_only=True)
class DecodeGraphs:
    """Graphs of steps in which every text gets one token, recorded when they are first needed.

    Attributes:
        run: runs the model on a batch and returns the logits `[R, V]`, without reading anything back.
        capture: records a function; tests give one that runs it each time.
        page_size: tokens of a page.
        max_length: positions of a text at most.
        device: where the tensors are.
        has_codes: the cache is quantized.
    """

    run: RunStep
    capture: Capture
    page_size: int
    max_length: int
    device: torch.device
    has_codes: bool = False
    _graphs: dict[Bucket, _Recorded] = field(default_factory=dict)

    @property
    def buckets(self) -> Mapping[Bucket, object]:
        """The buckets recorded so far."""
        return self._graphs

    def logits(self, batch: StepBatch) -> torch.Tensor:
        """Return float32 logits `[rows of batch, V]`; they are overwritten by the next call."""
        num_rows = len(batch.token_T)
        wanted = max(group.max_context for group in batch.groups)
        bucket = bucket_of(num_rows, wanted, max_length=self.max_length)
        recorded = self._graphs.get(bucket)
        if recorded is None:
            static = self._buffers(bucket, len(batch.groups))
            _fill(static, batch)
            recorded = _Recorded(batch=static, replay=self._record(bucket, static))
            self._graphs[bucket] = recorded
        _fill(recorded.batch, batch)
        return recorded.replay()[:num_rows]

    def _record(self, bucket: Bucket, static: StepBatch) -> Replay:
        def run() -> torch.Tensor:
            return self.run(static)

        try:
            return self.capture(run)
        except torch.OutOfMemoryError:
            logger.warning(
                "no memory to record decode steps of %d texts with up to %d tokens: they run unrecorded, slower; "
                "a smaller memory_share leaves more",
                bucket.rows,
                bucket.context,
            )
            return run

    def _buffers(self, bucket: Bucket, num_groups: int) -> StepBatch:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        groups = tuple(
            PagedBatch(
                query_start_R1=torch.arange(bucket.rows + 1, dtype=torch.int32, device=self.device),
                context_R=zeros(bucket.rows, dtype=torch.int32),
                page_table_RP=zeros(bucket.rows, -(-bucket.context // self.page_size), dtype=torch.int32),
                slot_T=zeros(bucket.rows, dtype=torch.int64),
                max_query=1,
                max_context=bucket.context,
            )
            for _ in range(num_groups)
        )
        return StepBatch(
            token_T=zeros(bucket.rows, dtype=torch.int64),
            position_T=zeros(bucket.rows, dtype=torch.int64),
            length_T=None,
            groups=groups,
            last_rows=torch.arange(bucket.rows, device=self.device),
            first_exact_T=zeros(bucket.rows, dtype=torch.int32) if self.has_codes else None,
        )


def _fill(static: StepBatch, batch: StepBatch) -> None:
    """Write a step into the tensors of a graph; the rows that are left see one key, in the reserved page."""
    num_rows = len(batch.token_T)
    for target, source in ((static.token_T, batch.token_T), (static.position_T, batch.position_T)):
        target[:num_rows] = source
        target[num_rows:] = 0
    if static.first_exact_T is not None and batch.first_exact_T is not None:
        static.first_exact_T[:num_rows] = batch.first_exact_T
        static.first_exact_T[num_rows:] = 0
    for target_group, group in zip(static.groups, batch.groups, strict=True):
        target_group.context_R[:num_rows] = group.context_R
        target_group.context_R[num_rows:] = 1
        width = group.page_table_RP.shape[1]
        target_group.page_table_RP[:num_rows, :width] = group.page_table_RP
        target_group.page_table_RP[num_rows:] = 0
        target_group.slot_T[:num_rows] = group.slot_T
        target_group.slot_T[num_rows:] = 0
