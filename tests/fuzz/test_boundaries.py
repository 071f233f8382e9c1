"""About two thousand damaged inputs, at every boundary; `benchmarks/fuzz.py` runs as many as one likes."""

from __future__ import annotations

from functools import partial

import pytest
from support.fuzzing.all_boundaries import every_boundary, quiet, run_boundary
from support.fuzzing.case import Boundary
from support.fuzzing.checkpoints import look_at, open_and_read
from support.fuzzing.guard import Watch, run_guarded, start_watch

INPUTS_PER_BOUNDARY = 50
SEED = 20
NUM_BOUNDARIES = 42


@pytest.fixture(scope="module")
def boundaries(tmp_path_factory: pytest.TempPathFactory) -> list[Boundary]:
    with quiet():
        return every_boundary(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return start_watch()


@pytest.mark.parametrize("number", range(NUM_BOUNDARIES))
def test_damaged_input_is_taken_or_refused_with_a_reason(boundaries: list[Boundary], watch: Watch, number: int) -> None:
    boundary = boundaries[number]
    num_inputs = round(INPUTS_PER_BOUNDARY * boundary.share)
    tally = run_boundary(boundary, seed=SEED, num_inputs=num_inputs, watch=watch)
    assert {fault: tally.details[fault] for fault in tally.faults} == {}, boundary.name


def test_every_boundary_has_a_test(boundaries: list[Boundary]) -> None:
    names = [boundary.name for boundary in boundaries]
    assert len(names) == NUM_BOUNDARIES
    assert len(set(names)) == len(names)


def test_undamaged_input_is_taken(boundaries: list[Boundary], watch: Watch) -> None:
    """A boundary that refuses everything would find nothing."""
    for boundary in boundaries:
        folder = boundary.folder
        if {"config.json", "model.safetensors"} <= set(folder.files):
            for reader in (open_and_read, look_at):
                outcome = run_guarded(partial(reader, folder.path), folder.path, watch)
                assert outcome.kind == "done", (boundary.name, outcome)
