"""Logs of large jobs: what repeats itself is told a few times and then counted."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import pytest

from optgptq.reports import events
from optgptq_cli import display
from optgptq_cli.progress import JobProgress
from optgptq_cli.repeats import PhaseLines, WarningLines, warning_kind

NUM_LAYERS = 80
LINEARS = (*tuple(f"self_attn.{side}_proj" for side in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def names() -> Iterator[tuple[int, str]]:
    for index in range(NUM_LAYERS):
        for linear in LINEARS:
            yield index, f"model.layers.{index}.{linear}"


def large_job() -> Iterator[events.ProgressEvent]:
    """What a model of 80 decoder layers with every job there is would tell."""
    yield events.JobStarted(title="gptq-w4", num_decoder_layers=NUM_LAYERS, num_linears=7 * NUM_LAYERS)
    for index, name in names():
        yield events.WarningRaised(message=f"{name}: tensor parallelism 16 does not divide {1024 + index} rows")
    yield events.PhaseStarted(name="calibration text", detail="self")
    for phase in ("grouping heads", "scales to fold"):
        for index in range(NUM_LAYERS):
            yield events.PhaseStarted(name=phase, detail=f"decoder layer {index + 1}/{NUM_LAYERS}")
    for index in range(NUM_LAYERS):
        yield events.DecoderLayerStarted(index=index)
        for linear in LINEARS:
            name = f"model.layers.{index}.{linear}"
            yield events.LinearFinished(
                layer_index=index,
                name=name,
                out_features=8192,
                in_features=8192,
                bits=4,
                loss=0.01,
                rtn_loss=0.02,
                seconds=3.0,
            )
            yield events.WarningRaised(message=f"{name}: damping raised to {0.01 * (index + 1):.3g}")
        yield events.WarningRaised(message=f"decoder layer {index}: its norms stay")
        yield events.DecoderLayerFinished(index=index, seconds=60.0, output_error=0.01, peak_memory_bytes=2**36)
    yield events.PhaseStarted(name="writing", detail="dense tensors and side files")
    yield events.PhaseStarted(name="verifying", detail="reading back every tensor")
    for index in range(NUM_LAYERS):
        yield events.PhaseStarted(name="kv cache", detail=f"decoder layer {index + 1}/{NUM_LAYERS}")


def test_the_log_of_eighty_decoder_layers_stays_short():
    job = JobProgress(clock=lambda: 0.0)
    lines = [line for event in large_job() for line in job.update(event)]
    lines += job.rest()
    assert len(lines) < 200
    assert sum(line.startswith("decoder layer ") for line in lines) == NUM_LAYERS
    for phase in ("grouping heads", "scales to fold", "kv cache"):
        told = [line for line in lines if phase in line]
        assert len(told) == 20
        assert told[0].endswith("decoder layer 1/80")
        assert told[-1].endswith("decoder layer 80/80")
    assert [line for line in lines if line.startswith("warning: ")] == [
        "warning: model.layers.0.self_attn.q_proj: tensor parallelism 16 does not divide 1024 rows",
        "warning: model.layers.0.self_attn.q_proj: damping raised to 0.01",
        "warning: decoder layer 0: its norms stay",
        'warning: 559 more like "model.layers.0.self_attn.q_proj: tensor parallelism 16 does not divide 1024 rows", '
        "see the run record",
        'warning: 559 more like "model.layers.0.self_attn.q_proj: damping raised to 0.01", see the run record',
        'warning: 79 more like "decoder layer 0: its norms stay", see the run record',
    ]


@pytest.mark.parametrize("quiet", [False, True])
def test_the_counts_reach_stderr_even_when_the_job_fails(capsys, quiet):
    def fail() -> None:
        with display.job_display(quiet=quiet) as listener:
            for _, name in names():
                listener(events.WarningRaised(message=f"{name}: damping raised"))
                logging.getLogger("optgptq.test").warning("%s: from the log", name)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    first = "model.layers.0.self_attn.q_proj"
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {first}: damping raised",
        f"warning: {first}: from the log",
        f'warning: 559 more like "{first}: damping raised", see the run record',
        f'warning: 559 more like "{first}: from the log", see the run record',
    ]


def test_two_of_a_kind_are_both_told_and_repeats_are_not_counted():
    warnings = WarningLines()
    for message in ("window 1 is short", "window 1 is short", "window 2 is short", "window 2 is short"):
        warnings.add(message)
    assert warnings.take_rest() == ("warning: window 2 is short",)
    assert warnings.take_rest() == ()


def test_there_is_a_limit_to_the_kinds_that_are_told():
    warnings = WarningLines()
    words = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst"]
    lines = [line for word in words for line in warnings.add(f"careful with {word}")]
    assert len(lines) == 60
    assert warnings.take_rest() == ("warning: 40 more of other kinds, see the run record",)


def test_a_command_without_a_run_record_tells_every_warning(capsys):
    with display.plain_log(quiet=True):
        for index in range(100):
            logging.getLogger("optgptq.test").warning("request %d is long", index)
    assert len(capsys.readouterr().err.splitlines()) == 100


def test_a_kind_is_what_remains_without_names_and_numbers():
    assert warning_kind("model.layers.3.mlp.down_proj: damping 1e-2 of 0.01") == "#: damping # of #"
    assert warning_kind("mean loss -1.5e-03, 3/80") == "mean loss #, #/#"
    assert warning_kind("no number here") == "no number here"


@pytest.mark.parametrize("total", [1, 2, 19, 20, 21, 39, 80, 126, 1000])
def test_a_pass_over_layers_is_told_with_its_first_and_last(total):
    phases = PhaseLines()
    told = [index for index in range(1, total + 1) if phases.is_told("kv cache", f"decoder layer {index}/{total}")]
    assert len(told) == min(total, 20)
    assert (told[0], told[-1]) == (1, total)
    gaps = [after - before for before, after in itertools.pairwise(told)]
    assert max(gaps, default=1) <= -(-total // 19)


def test_a_phase_without_a_count_is_told_less_and_less():
    phases = PhaseLines()
    told = [index for index in range(1, 1001) if phases.is_told("reading", f"file {index}")]
    assert told == [*range(1, 21), 32, 64, 128, 256, 512]
