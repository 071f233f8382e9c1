"""Progress: the figures, the plain lines, the quiet form, and the live view."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from optgptq.reports import events
from optgptq_cli import display
from optgptq_cli.progress import JobProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def linear(index: int, name: str, *, bits: int | None = 4) -> events.LinearFinished:
    loss = None if bits is None else 0.01
    return events.LinearFinished(
        layer_index=index,
        name=name,
        out_features=64,
        in_features=128,
        bits=bits,
        loss=loss,
        rtn_loss=None if bits is None else 0.03,
        seconds=0.5,
    )


def finished(index: int, *, error: float | None = 0.002) -> events.DecoderLayerFinished:
    return events.DecoderLayerFinished(index=index, seconds=2.0, output_error=error, peak_memory_bytes=3 * 2**29)


START = events.JobStarted(title="gptq-w4", num_decoder_layers=4, num_linears=28)


def test_a_decoder_layer_is_one_line_with_everything_in_it():
    clock = Clock()
    job = JobProgress(clock=clock)
    assert job.update(START) == ("gptq-w4: 28 linears in 4 decoder layers",)
    assert job.update(events.DecoderLayerStarted(index=0)) == ()
    assert job.update(events.StageStarted(layer_index=0, stage="qkv")) == ()
    assert job.phase == "decoder layer 1, qkv"
    assert job.update(linear(0, "a")) == ()
    assert job.update(linear(0, "b", bits=None)) == ()
    clock.now += 20
    assert job.update(finished(0)) == (
        "decoder layer 1/4, 1 linears, 1 left dense, mean loss 1.000e-02 (rounding 3.000e-02), output error 2.000e-03, "
        "2.0 s, peak 1.5 GiB, 1:00 left",
    )


def test_the_time_left_follows_the_layers_that_are_done():
    clock = Clock()
    job = JobProgress(clock=clock)
    job.update(START)
    clock.now += 1000  # calibration text: not part of a layer
    assert job.seconds_left() is None
    for index in range(4):
        job.update(events.DecoderLayerStarted(index=index))
        clock.now += 10
        (line,) = job.update(finished(index, error=None))
        assert job.seconds_left() == pytest.approx(10 * (3 - index))
    assert "left" not in line
    assert "output error" not in line


def test_a_phase_and_a_warning_are_lines_and_a_warning_is_told_once():
    job = JobProgress(clock=Clock())
    assert job.update(events.PhaseStarted(name="verifying", detail="every tensor")) == (
        "[0.0 s] verifying: every tensor",
    )
    assert job.update(events.WarningRaised(message="careful")) == ("warning: careful",)
    assert job.update(events.WarningRaised(message="careful")) == ()


def run_job(listener) -> None:
    logger = logging.getLogger("optgptq.test")
    listener(START)
    logger.info("not shown")
    logger.warning("from the log %d", 7)
    listener(events.WarningRaised(message="from an event"))
    listener(events.WarningRaised(message="from the log 7"))
    listener(events.DecoderLayerStarted(index=0))
    listener(linear(0, "model.layers.0.self_attn.q_proj"))
    listener(finished(0))


def test_plain_lines_go_to_stderr(capsys):
    with display.job_display(quiet=False) as listener:
        run_job(listener)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[:3] == [
        "gptq-w4: 28 linears in 4 decoder layers",
        "warning: from the log 7",
        "warning: from an event",
    ]
    assert lines[3].startswith("decoder layer 1/4, 1 linears, mean loss")
    assert len(lines) == 4


def test_quiet_leaves_the_warnings(capsys):
    with display.job_display(quiet=True) as listener:
        run_job(listener)
    assert capsys.readouterr().err == "warning: from the log 7\nwarning: from an event\n"


def test_the_logger_is_left_as_it_was():
    logger = logging.getLogger("optgptq")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with display.plain_log(quiet=False):
        assert logger.level == logging.INFO
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_the_live_part_shows_stage_losses_memory_and_time_left():
    clock = Clock()
    job = JobProgress(clock=clock)
    job.update(START)
    job.update(events.DecoderLayerStarted(index=0))
    job.update(linear(0, "model.layers.0.self_attn.q_proj"))
    job.update(linear(0, "model.layers.0.mlp.down_proj", bits=None))
    clock.now += 30
    job.update(finished(0))
    job.update(events.StageStarted(layer_index=1, stage="gate_up"))
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    console.print(display._render(job, console))
    text = console.file.getvalue()
    assert "model.layers.0.self_attn.q_proj" in text
    assert "64 x 128" in text
    assert "1.000e-02" in text
    assert "dense" in text
    assert "decoder layer 2, gate_up · 30 s elapsed · 1:30 left · memory" in text


def test_the_live_part_before_the_job_starts_is_one_line():
    console = Console(file=io.StringIO(), width=100)
    console.print(display._render(JobProgress(clock=Clock()), console))
    assert console.file.getvalue().startswith("starting · 0.0 s elapsed")


def test_only_the_last_linears_are_kept():
    job = JobProgress(clock=Clock())
    for index in range(20):
        job.update(linear(0, str(index)))
    assert [item.name for item in job.recent] == [str(index) for index in range(12, 20)]


def test_steps_are_silent_where_there_is_no_terminal(capsys):
    with display.step_display("windows", quiet=False) as progress:
        progress(1, 2)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
