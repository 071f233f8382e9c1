"""Opening and reading checkpoint folders, and every guard with the values its message gives."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.checkpoints import STORY_LLAMA

from optgptq.checkpoint.folder import INDEX_FILE, SINGLE_FILE, CheckpointFolder
from optgptq.errors import ExitCode, ModelError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "b.weight": torch.tensor(3.5, dtype=torch.float64),
    "c.bias": torch.tensor([True, False]),
    "d.weight": torch.zeros(0, 7, dtype=torch.int32),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder: two shards, an index, a config, a tokenizer file in a sub-folder."""
    path = tmp_path / "model"
    (path / "extra").mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "extra" / "notes.txt").write_text("notes")
    (path / ".hidden").write_text("not listed")
    save_file({name: TENSORS[name] for name in ("a.weight", "b.weight")}, path / "one.safetensors")
    save_file({name: TENSORS[name] for name in ("c.bias", "d.weight")}, path / "two.safetensors")
    write_index(path, {"a.weight": "one", "b.weight": "one", "c.bias": "two", "d.weight": "two"})
    return path


def write_index(path: Path, files: dict[str, str]) -> None:
    weight_map = {name: f"{file}.safetensors" for name, file in files.items()}
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def write_raw(path: Path, header: object, data: bytes) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def entry(begin: int, end: int, *, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_bundled_model_reads_as_safetensors_reads_it() -> None:
    checkpoint = CheckpointFolder.open(STORY_LLAMA)
    with safe_open(STORY_LLAMA / SINGLE_FILE, "pt") as reference:
        assert sorted(reference.keys()) == list(checkpoint.tensors)
        for name in checkpoint.tensors:
            tensor = checkpoint.read(name)
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, reference.get_tensor(name))
    assert checkpoint.weight_files == (SINGLE_FILE,)
    assert checkpoint.side_files == ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    assert checkpoint.config["model_type"] == "llama"


def test_shards_dtypes_and_empty_tensors(folder: Path) -> None:
    checkpoint = CheckpointFolder.open(folder)
    assert list(checkpoint.tensors) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read, tensor)
    assert checkpoint.weight_files == ("one.safetensors", "two.safetensors")
    assert checkpoint.side_files == ("config.json", "extra/notes.txt")


def test_chunks_join_to_the_tensor(folder: Path) -> None:
    checkpoint = CheckpointFolder.open(folder)
    chunks = [chunk.clone() for chunk in checkpoint.read_chunks("a.weight", 7)]
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 3]
    assert torch.equal(torch.cat(chunks).view(torch.bfloat16).reshape(3, 4), TENSORS["a.weight"])
    assert list(checkpoint.read_chunks("d.weight")) == []


def test_read_tensors_own_their_memory(folder: Path) -> None:
    checkpoint = CheckpointFolder.open(folder)
    checkpoint.read("a.weight").zero_()
    assert torch.equal(checkpoint.read("a.weight"), TENSORS["a.weight"])


def test_pickles_and_stray_weights_are_left_out(folder: Path) -> None:
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "old.pt", "consolidated.safetensors", "m.gguf"):
        (folder / name).write_bytes(b"x")
    checkpoint = CheckpointFolder.open(folder)
    assert checkpoint.side_files == ("config.json", "extra/notes.txt")
    assert "pytorch_model.bin" in checkpoint.left_out_files
    assert "consolidated.safetensors" in checkpoint.left_out_files


def refused(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        CheckpointFolder.open(path)
    assert caught.value.exit_code == ExitCode.INPUT
    assert caught.value.action.endswith((".", "it.", "model."))
    return caught.value


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/passwd", "extra/one.safetensors", "..", "", "a\\b", 3])
def test_index_naming_a_file_outside_is_refused(folder: Path, name: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    error = refused(folder)
    assert error.where.endswith(f"{INDEX_FILE}, tensor a.weight")
    assert error.found == repr(name)
    assert "outside its folder" in error.action


@pytest.mark.parametrize("name", ["one.safetensors", "tokenizer.json", "config.json"])
def test_symlink_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "secret"
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    error = refused(folder)
    assert error.where == str(folder / name)
    assert error.found == f"a symlink to {outside}"


def test_symlinked_sub_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert refused(folder).found == "a symlink to a folder"


def test_symlink_within_the_folder_is_followed(folder: Path) -> None:
    (folder / "one.safetensors").rename(folder / "extra" / "blob")
    (folder / "one.safetensors").symlink_to("extra/blob")
    assert torch.equal(CheckpointFolder.open(folder).read("a.weight"), TENSORS["a.weight"])


def test_hub_snapshot_may_link_to_the_blobs_of_its_own_repository(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        blob = repository / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert list(CheckpointFolder.open(snapshot).tensors) == sorted(TENSORS)
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(other / "0")
    assert refused(snapshot).found == f"a symlink to {other / '0'}"


def test_fifo_is_refused(folder: Path) -> None:
    (folder / "one.safetensors").unlink()
    os.mkfifo(folder / "one.safetensors")
    assert refused(folder).expected == "a regular file"


def test_missing_shard(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    error = refused(folder)
    assert error.where == str(folder / "two.safetensors")
    assert "complete" in error.action


def test_tensor_in_index_but_in_no_shard(folder: Path) -> None:
    write_index(folder, {"a.weight": "one", "b.weight": "one", "c.bias": "two", "d.weight": "two", "e.weight": "two"})
    error = refused(folder)
    assert error.where == f"{INDEX_FILE}, tensor e.weight"
    assert "in no shard" in error.expected


def test_tensor_in_another_shard_than_the_index_says(folder: Path) -> None:
    write_index(folder, {"a.weight": "two", "b.weight": "one", "c.bias": "two", "d.weight": "two"})
    assert refused(folder).expected.endswith("(one.safetensors)")


def test_tensor_in_two_shards(folder: Path) -> None:
    save_file({"c.bias": TENSORS["c.bias"], "a.weight": TENSORS["a.weight"]}, folder / "two.safetensors")
    error = refused(folder)
    assert error.where == "tensor a.weight"
    assert error.found == "one.safetensors and two.safetensors"


def test_truncated_shard(folder: Path) -> None:
    content = (folder / "one.safetensors").read_bytes()
    (folder / "one.safetensors").write_bytes(content[:-5])
    error = refused(folder)
    assert error.expected == f"{len(content)} bytes"
    assert error.found.startswith(f"{len(content) - 5} bytes: the file is truncated")


def test_bytes_behind_the_last_tensor(folder: Path) -> None:
    with (folder / "one.safetensors").open("ab") as stream:
        stream.write(b"hidden")
    assert "belong to no tensor" in refused(folder).found


def test_file_that_shrinks_after_it_was_opened(folder: Path) -> None:
    checkpoint = CheckpointFolder.open(folder)
    os.truncate(folder / "one.safetensors", checkpoint.info("a.weight").end - 1)
    with pytest.raises(ModelError, match="shorter after it was opened"):
        checkpoint.read("a.weight")


def test_unknown_tensor_name(folder: Path) -> None:
    with pytest.raises(ModelError, match="none among 4 tensors"):
        CheckpointFolder.open(folder).read("z.weight")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "begins at byte"),
        ({"a": entry(0, 4), "b": entry(5, 9)}, 9, "begins at byte"),
        ({"a": entry(2, 6)}, 6, "begins at byte"),
        ({"a": entry(0, 4, shape=[5])}, 4, "5 bytes for U8"),
        ({"a": entry(0, 4, shape=[-4])}, 4, "integers from 0 up"),
        ({"a": entry(0, 4, shape=[2**70, 0])}, 4, "integers from 0 up"),
        ({"a": entry(0, 4, dtype="Q4")}, 4, "a dtype among"),
        ({"a": {"dtype": "U8", "shape": [4]}}, 4, "data_offsets"),
        ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, 1, "integers from 0 up"),
        ([1, 2], 0, "a JSON object"),
        (b"{nonsense", 0, "JSON with unique keys"),
        (b'{"a": {}, "a": {}}', 0, "appears twice"),
        (b"[" * 100_000, 0, "JSON with unique keys"),
    ],
)
def test_bad_headers(folder: Path, header: object, data: int, message: str) -> None:
    (folder / INDEX_FILE).unlink()
    write_raw(folder / SINGLE_FILE, header, bytes(data))
    assert message in str(refused(folder))


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"\xff" * 8 + b"{}", struct.pack("<Q", 1000) + b"{}"])
def test_header_length_out_of_bounds(folder: Path, content: bytes) -> None:
    (folder / INDEX_FILE).unlink()
    (folder / SINGLE_FILE).write_bytes(content)
    assert "truncated or not safetensors" in refused(folder).found


def remove_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / INDEX_FILE).unlink()


def only_pickles(folder: Path) -> None:
    remove_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")


def shards_without_index(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()


def stale_single_file(folder: Path) -> None:
    save_file({"a.weight": TENSORS["a.weight"]}, folder / SINGLE_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_weights, "no weights"),
        (only_pickles, "Convert the weights to safetensors first"),
        (shards_without_index, "which shards belong together"),
        (stale_single_file, "Remove whichever of the two is stale"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "expected JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"), "expected JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object, found list"),
        (lambda folder: (folder / INDEX_FILE).write_text("{}"), "a weight_map from tensor names to files"),
        (lambda folder: (folder / INDEX_FILE).write_text('{"weight_map": {}}'), "an empty one"),
    ],
)
def test_incomplete_folders(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    assert message in str(refused(folder))


def test_path_that_is_no_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "missing").found == "nothing there"
    (tmp_path / "file").write_text("x")
    assert refused(tmp_path / "file").found == "a file"


def test_unreadable_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = CheckpointFolder.open(folder)

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(ModelError, match="Permission denied"):
        checkpoint.read("a.weight")
