"""Progress on stderr: a live view where stderr is a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .output import human_bytes, human_seconds, write_note
from .progress import JobProgress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from optgptq.reports.events import ProgressEvent, ProgressListener

_REFRESH_PER_SECOND = 5


@contextmanager
def job_display(*, quiet: bool) -> Iterator[ProgressListener]:
    """Yield a listener that shows a job's events on stderr until the block ends.

    Quiet shows warnings only. The library's log goes the same way, so that no line breaks the live view and no
    warning is shown twice.
    """
    job = JobProgress()
    if quiet:
        with log_lines(_warnings_only(job), level=logging.WARNING), _rest_at_end(job):
            yield _quiet_listener(job)
    elif _can_redraw():
        with _rest_at_end(job), _live_view(job) as listener:
            yield listener
    else:
        with log_lines(lambda record: _write_lines(_log_lines(job, record)), level=logging.WARNING), _rest_at_end(job):
            yield lambda event: _write_lines(job.update(event))


@contextmanager
def _rest_at_end(job: JobProgress) -> Iterator[None]:
    """Tell after the block, whatever its end, of the warnings that were only counted."""
    try:
        yield
    finally:
        _write_lines(job.rest())


def _can_redraw() -> bool:
    """Return whether stderr is a terminal that a person watches and that can move its cursor."""
    from rich.console import Console

    from optgptq.environment import read_environment

    if not sys.stderr.isatty() or read_environment().continuous_integration:
        return False
    return Console(stderr=True).is_interactive


@contextmanager
def log_lines(emit: Callable[[logging.LogRecord], None], *, level: int) -> Iterator[None]:
    """Hand the records of the library's logger from `level` up to `emit` while the block runs."""
    handler = _CallingHandler(emit)
    logger = logging.getLogger("optgptq")
    previous_level, previous_propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous_level)
        logger.propagate = previous_propagate


@contextmanager
def plain_log(*, quiet: bool) -> Iterator[None]:
    """Write the library's log to stderr as plain lines while the block runs: warnings only when quiet."""
    job = JobProgress(folds_warnings=False)
    level = logging.WARNING if quiet else logging.INFO
    with log_lines(lambda record: _write_lines(_log_lines(job, record)), level=level):
        yield


@contextmanager
def step_display(description: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a callable that takes steps done and steps in all: a bar on a terminal, nothing elsewhere."""
    if quiet or not _can_redraw():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _CallingHandler(logging.Handler):
    """Hands each log record to a callable."""

    def __init__(self, emit: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit(record)


def _log_lines(job: JobProgress, record: logging.LogRecord) -> tuple[str, ...]:
    message = record.getMessage()
    return job.warn(message) if record.levelno >= logging.WARNING else (message,)


def _write_lines(lines: tuple[str, ...]) -> None:
    for line in lines:
        write_note(line)


def _warnings_only(job: JobProgress) -> Callable[[logging.LogRecord], None]:
    return lambda record: _write_lines(_log_lines(job, record))


def _quiet_listener(job: JobProgress) -> ProgressListener:
    from optgptq.reports.events import WarningRaised

    def listen(event: ProgressEvent) -> None:
        lines = job.update(event)
        if isinstance(event, WarningRaised):
            _write_lines(lines)

    return listen


@contextmanager
def _live_view(job: JobProgress) -> Iterator[ProgressListener]:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)

    def write(lines: tuple[str, ...]) -> None:
        for line in lines:
            console.print(line, markup=False, soft_wrap=True, style="yellow" if line.startswith("warning:") else None)

    view = Live(
        get_renderable=lambda: _render(job, console),
        console=console,
        refresh_per_second=_REFRESH_PER_SECOND,
        transient=True,
    )
    with view, log_lines(lambda record: write(_log_lines(job, record)), level=logging.WARNING):
        yield lambda event: write(job.update(event))


def _render(job: JobProgress, console: Console) -> RenderableType:
    """Return the live part: what happens now, how far it is, and the linears solved last."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from optgptq.memory import resident_memory_bytes

    facts = [job.phase or "starting", f"{job.elapsed()} elapsed"]
    left = job.seconds_left()
    if left is not None:
        facts.append(f"{human_seconds(left)} left")
    resident = resident_memory_bytes()
    if resident is not None:
        facts.append(f"memory {human_bytes(resident)}")
    status = Text(" · ".join(facts), no_wrap=True, overflow="ellipsis")
    if not job.num_decoder_layers:
        return status
    bar = ProgressBar(total=job.num_decoder_layers, completed=job.num_finished, width=min(console.width, 60))
    linears = Table("linear", "shape", "bits", "loss", "rounding", "time", box=None, pad_edge=False)
    for linear in job.recent:
        linears.add_row(
            Text(linear.name),
            f"{linear.out_features} x {linear.in_features}",
            "dense" if linear.bits is None else str(linear.bits),
            "-" if linear.loss is None else f"{linear.loss:.3e}",
            "-" if linear.rtn_loss is None else f"{linear.rtn_loss:.3e}",
            human_seconds(linear.seconds),
        )
    return Group(linears, bar, status)
