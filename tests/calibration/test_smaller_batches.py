"""Batches that are split when memory runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.memory_faults import room_for
from support.quantizable import padded_windows, tiny_model, write_model
from support.tiny_models import random_tokens

from optgptq.calibration.disk_states import DiskStore
from optgptq.calibration.smaller_batches import with_smaller_batches
from optgptq.calibration.states import ActivationStore, MemoryStore
from optgptq.calibration.stream import ActivationStream, embed
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.models.attention import attention_context
from optgptq.models.loading import load_embedding, load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import STAGE_NAMES

LENGTHS = [6, 6, 6, 6, 3, 6, 6, 6, 2, 6, 6]
NUM_HELD_OUT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    path = tmp_path_factory.mktemp("llama") / "model"
    return CheckpointFolder.open(write_model(tiny_model("llama-grouped_query"), path))


def stream_of(folder: CheckpointFolder, size: int, store: ActivationStore | None = None) -> ActivationStream:
    spec = model_spec(folder)
    windows = padded_windows(random_tokens(len(LENGTHS), 6, vocab_size=258), LENGTHS)
    return embed(
        windows,
        load_embedding(folder, spec, dtype=torch.float32),
        attention_context(spec, 6),
        windows_per_batch=size,
        num_held_out=NUM_HELD_OUT,
        store=store,
    )


def layout(stream: ActivationStream) -> list[tuple[int, int, bool, list[list[bool]] | None]]:
    return [
        (batch.first_window, batch.num_windows, batch.held_out, None if mask is None else mask.tolist())
        for batch in stream.batches
        for mask in [batch.valid_BS]
    ]


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_batches_are_those_of_a_stream_that_began_with_the_smaller_size(
    size: int, disk: bool, folder: CheckpointFolder, tmp_path: Path
) -> None:
    with DiskStore(tmp_path) as on_disk:
        store = on_disk if disk else MemoryStore()
        large = stream_of(folder, 6, store)
        before = layout(large)
        small, expected = with_smaller_batches(large, size), stream_of(folder, size, store)
        assert layout(small) == layout(expected)
        for found, wanted in zip(small.batches, expected.batches, strict=True):
            assert torch.equal(found.state.hidden_BSM, wanted.state.hidden_BSM)
        assert layout(large) == before


def test_every_batch_is_split_on_its_own(folder: CheckpointFolder) -> None:
    sizes = [batch.num_windows for batch in with_smaller_batches(stream_of(folder, 5), 2).batches]
    assert sizes == [2, 2, 1, 2, 2, 2]


def test_smaller_batches_reach_the_same_place(folder: CheckpointFolder) -> None:
    layer = load_layer(folder, model_spec(folder), 0, dtype=torch.float32)
    large = stream_of(folder, 6)
    small = with_smaller_batches(large, 2)
    with torch.no_grad():
        for stage in STAGE_NAMES:
            large.advance(layer, stage)
            small.advance(layer, stage)
    rows = [torch.cat([batch.state.hidden_BSM for batch in stream.batches]) for stream in (large, small)]
    torch.testing.assert_close(rows[0], rows[1])


def test_a_stream_inside_a_layer_is_not_split(folder: CheckpointFolder) -> None:
    stream = stream_of(folder, 6)
    with torch.no_grad():
        stream.advance(load_layer(folder, model_spec(folder), 0, dtype=torch.float32), "qkv")
    with pytest.raises(ValueError, match="before a decoder layer"):
        with_smaller_batches(stream, 2)


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_a_layer_that_ran_out_of_memory_is_walked_again_from_a_snapshot(
    disk: bool, folder: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = load_layer(folder, model_spec(folder), 0, dtype=torch.float32)
    with DiskStore(tmp_path) as on_disk, torch.no_grad():
        store = on_disk if disk else MemoryStore()
        stream = stream_of(folder, 3, store)
        # The smallest comes first and is behind its attention when the next one fails.
        stream.batches.reverse()
        start, expected = stream.snapshot(), with_smaller_batches(stream, 2)
        with room_for(2, monkeypatch) as refused:
            with pytest.raises(torch.OutOfMemoryError):
                stream.advance(layer, "qkv")
            assert stream.batches[0].state.heads_BSI is not None
            again = with_smaller_batches(start, 2)
            for stage in STAGE_NAMES:
                again.advance(layer, stage)
        for stage in STAGE_NAMES:
            expected.advance(layer, stage)
        assert refused == [3]
        assert [batch.num_windows for batch in again.batches] == [1, 2, 1, 1, 2, 1, 2, 1]
        for found, wanted in zip(again.batches, expected.batches, strict=True):
            assert torch.equal(found.state.hidden_BSM, wanted.state.hidden_BSM)
