"""Shards: what safetensors reads from them, their bytes, and what happens when the disk does not take them."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from optgptq.checkpoint.folder import INDEX_FILE, SINGLE_FILE, CheckpointFolder
from optgptq.checkpoint.writer import ShardWriter, TensorEntry, plan_shards
from optgptq.errors import CapacityError, ExitCode, OptGPTQError, OutputError

TENSORS = {
    "odd.bytes": torch.arange(7, dtype=torch.uint8),
    "odd.halves": torch.arange(15, dtype=torch.float16).reshape(3, 5),
    "words": torch.arange(8, dtype=torch.int32),
    "shape": torch.tensor([3, 4]),
    "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
    "scalar": torch.tensor(1.5),
}
ENTRIES = [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def write_all(folder: Path, *, max_shard_bytes: int, names: list[str] | None = None) -> ShardWriter:
    folder.mkdir()
    writer = ShardWriter(folder, ENTRIES, max_shard_bytes=max_shard_bytes)
    for name in names or list(TENSORS):
        writer.write(name, TENSORS[name])
    writer.finish()
    (folder / "config.json").write_text("{}")
    return writer


@pytest.mark.parametrize("max_shard_bytes", [1, 40, 10**9])
def test_safetensors_reads_what_was_written(tmp_path: Path, max_shard_bytes: int) -> None:
    writer = write_all(tmp_path / "out", max_shard_bytes=max_shard_bytes)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(entry.num_bytes for entry in ENTRIES)
    assert set(index["weight_map"]) == set(TENSORS)
    assert set(index["weight_map"].values()) == set(writer.files)
    for name, tensor in TENSORS.items():
        with safe_open(tmp_path / "out" / index["weight_map"][name], "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert torch.equal(shard.get_tensor(name), tensor)
    checkpoint = CheckpointFolder.open(tmp_path / "out")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())


def test_file_names(tmp_path: Path) -> None:
    assert write_all(tmp_path / "one", max_shard_bytes=10**9).files == (SINGLE_FILE,)
    many = write_all(tmp_path / "many", max_shard_bytes=1).files
    assert many[0] == "model-00001-of-00006.safetensors"
    assert len(many) == 6


def test_bytes_do_not_depend_on_the_order_of_writes(tmp_path: Path) -> None:
    write_all(tmp_path / "a", max_shard_bytes=40)
    write_all(tmp_path / "b", max_shard_bytes=40, names=list(reversed(TENSORS)))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_every_tensor_begins_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    write_all(tmp_path / "out", max_shard_bytes=10**9)
    for info in CheckpointFolder.open(tmp_path / "out").tensors.values():
        assert info.begin % info.torch_dtype.itemsize == 0


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20), limit=st.integers(1, 100))
def test_shards_are_within_the_limit_unless_one_tensor_is_larger(sizes: list[int], limit: int) -> None:
    entries = [TensorEntry(str(number), torch.uint8, (size,)) for number, size in enumerate(sizes)]
    shards = plan_shards(entries, limit)
    assert [entry for shard in shards for entry in shard] == entries
    assert all(shard and (len(shard) == 1 or sum(entry.num_bytes for entry in shard) <= limit) for shard in shards)


def test_chunks_and_strided_tensors(tmp_path: Path) -> None:
    matrix = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    entries = [TensorEntry("a", torch.int32, (4, 3)), TensorEntry("b", torch.int32, (3, 4))]
    writer = ShardWriter(tmp_path, entries, max_shard_bytes=10**9)
    writer.write("a", matrix.t())
    writer.write_chunks("b", matrix.view(torch.uint8).reshape(-1).split(7))
    writer.finish()
    with safe_open(tmp_path / SINGLE_FILE, "pt") as shard:
        assert torch.equal(shard.get_tensor("a"), matrix.t())
        assert torch.equal(shard.get_tensor("b"), matrix)


def misused(folder: Path, name: str, tensor: torch.Tensor) -> OptGPTQError:
    folder.mkdir()
    writer = ShardWriter(folder, [TensorEntry("a", torch.int32, (2,))], max_shard_bytes=10)
    with pytest.raises(OptGPTQError) as caught:
        writer.write(name, tensor)
    assert caught.value.exit_code == ExitCode.BUG
    return caught.value


def test_misuse_is_reported_as_a_bug(tmp_path: Path) -> None:
    words = torch.zeros(2, dtype=torch.int32)
    assert misused(tmp_path / "name", "b", words).found == "none of that name was planned"
    assert misused(tmp_path / "dtype", "a", words.float()).found == "torch.float32 [2]"
    assert misused(tmp_path / "shape", "a", words[:1]).found == "torch.int32 [1]"


def test_every_tensor_is_written_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, [TensorEntry("a", torch.int32, (2,))], max_shard_bytes=10)
    with pytest.raises(OptGPTQError, match="1 missing, the first is a"):
        writer.finish()
    writer.write("a", torch.zeros(2, dtype=torch.int32))
    with pytest.raises(OptGPTQError, match="written already"):
        writer.write("a", torch.zeros(2, dtype=torch.int32))
    with pytest.raises(OptGPTQError, match="found two"):
        ShardWriter(tmp_path, [TensorEntry("a", torch.int32, (2,))] * 2, max_shard_bytes=10)


@pytest.mark.parametrize("size", [3, 5])
def test_chunks_of_another_size_are_refused(tmp_path: Path, size: int) -> None:
    writer = ShardWriter(tmp_path, [TensorEntry("a", torch.uint8, (4,))], max_shard_bytes=10)
    with pytest.raises(OptGPTQError, match="stop or overrun"):
        writer.write_chunks("a", [torch.zeros(size, dtype=torch.uint8)])


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let the kernel refuse writes beyond `num_bytes`, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_file_that_the_disk_does_not_take(tmp_path: Path) -> None:
    entries = [TensorEntry("a", torch.uint8, (100_000,))]
    with file_size_limit(4096), pytest.raises(CapacityError) as caught:
        ShardWriter(tmp_path, entries, max_shard_bytes=10**9)
    assert caught.value.exit_code == ExitCode.CAPACITY
    assert caught.value.where == str(tmp_path / SINGLE_FILE)


def test_disk_full_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, ENTRIES, max_shard_bytes=10**9)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CapacityError, match="No space left on device"):
        writer.write("words", TENSORS["words"])


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, position: whole(descriptor, data[:5], position))
    write_all(tmp_path / "out", max_shard_bytes=10**9)
    monkeypatch.undo()
    checkpoint = CheckpointFolder.open(tmp_path / "out")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def denied(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(OutputError, match=os.strerror(code)):
        ShardWriter(tmp_path, ENTRIES, max_shard_bytes=10**9)
