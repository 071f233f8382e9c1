"""A safetensors checkpoint folder, opened without reading a single weight; tensors are then read one at a time.

Reading is a plain `pread` into fresh memory: a mapped file would count as resident memory and grow with the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch

from optgptq.checkpoint.paths import PICKLE_SUFFIXES, is_left_out, list_files, require_inside, require_plain_name
from optgptq.checkpoint.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo, parse_header
from optgptq.checkpoint.source import tensor_info
from optgptq.errors import ModelError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_JSON_BYTES = 100_000_000

__all__ = ["CONFIG_FILE", "INDEX_FILE", "SINGLE_FILE", "CheckpointFolder", "TensorInfo", "read_json_object"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheckpointFolder:
    """What a checkpoint folder holds.

    Attributes:
        path: the folder.
        config: `config.json`, parsed.
        tensors: every stored tensor by name, sorted by name.
        weight_files: the safetensors files, sorted.
        side_files: every other file (tokenizer, generation config, ...), relative names, sorted; `config.json`
            included, the index, hidden files and foreign weights not.
        left_out_files: pickles and weights of other engines: never loaded, never copied.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    weight_files: tuple[str, ...]
    side_files: tuple[str, ...]
    left_out_files: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open `path` and check all headers against file sizes, each other and the index.

        Raises:
            ModelError: anything that is missing, truncated, contradictory or outside the folder.
        """
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing there"
            raise ModelError(
                str(path), expected="a model folder", found=found, action="Give the folder that holds config.json."
            )
        names = list_files(path)
        config = read_json_object(path, CONFIG_FILE)
        weight_map = _weight_map(path, names)
        weight_files = tuple(sorted(set(weight_map.values()))) if weight_map is not None else (SINGLE_FILE,)
        tensors = _merge({file: _read_header(path, file) for file in weight_files})
        if weight_map is not None:
            _require_same_names(weight_map, tensors)
        others = [name for name in names if name not in weight_files and name != INDEX_FILE]
        side_files = tuple(name for name in others if not is_left_out(name))
        for name in side_files:
            require_inside(path, name)
        return cls(
            path=path,
            config=config,
            tensors=MappingProxyType(dict(sorted(tensors.items()))),
            weight_files=weight_files,
            side_files=side_files,
            left_out_files=tuple(name for name in others if is_left_out(name)),
        )

    def info(self, name: str) -> TensorInfo:
        """Return where tensor `name` is; ModelError if the checkpoint does not hold it."""
        return tensor_info(self, name, action="Check that the weights belong to config.json.")

    def read(self, name: str) -> torch.Tensor:
        """Return tensor `name` on the CPU, in its stored dtype and shape, in memory of its own.

        Raises:
            ModelError: no such tensor, or the file is shorter than its header says.
        """
        info = self.info(name)
        data = torch.empty(info.num_bytes, dtype=torch.uint8)
        self._read_into(data, info, info.begin)
        return data.view(info.torch_dtype).reshape(info.shape)

    def read_chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[torch.Tensor]:
        """Yield the bytes of tensor `name` as uint8 tensors of at most `chunk_bytes`; each is valid until the next."""
        info = self.info(name)
        buffer = torch.empty(min(chunk_bytes, info.num_bytes), dtype=torch.uint8)
        for begin in range(info.begin, info.end, chunk_bytes):
            chunk = buffer[: min(chunk_bytes, info.end - begin)]
            self._read_into(chunk, info, begin)
            yield chunk

    def _read_into(self, data: torch.Tensor, info: TensorInfo, begin: int) -> None:
        view = data.numpy().data
        path = self.path / info.file
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < len(view):
                    count = os.preadv(descriptor, [view[done:]], begin + done)
                    if count == 0:
                        break
                    done += count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unreadable(path, error) from error
        if done < len(view):
            raise ModelError(
                f"{path}, tensor {info.name}",
                expected=f"{len(view)} bytes at {begin}",
                found=f"{done} bytes: the file became shorter after it was opened",
                action="Leave the checkpoint alone while it is read, and start again.",
            )


def read_json_object(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in file `name` of `folder`; ModelError if it is missing, too large or not an object."""
    path = require_inside(folder, name)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(
                str(path),
                expected=f"at most {MAX_JSON_BYTES} bytes",
                found=f"{path.stat().st_size} bytes",
                action="Check the file: no configuration is that large.",
            )
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(
            str(path), expected="JSON in UTF-8", found=str(error), action="Download or export the file again."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(
            str(path),
            expected="a JSON object",
            found=type(content).__name__,
            action="Download or export the file again.",
        )
    return content


def _weight_map(folder: Path, names: list[str]) -> dict[str, str] | None:
    """Return tensor name -> file from the index; None when the folder has a single file and no index."""
    if INDEX_FILE not in names:
        if SINGLE_FILE not in names:
            raise _no_weights(folder, names)
        return None
    where = str(folder / INDEX_FILE)
    weight_map = read_json_object(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            where,
            expected="a weight_map from tensor names to files",
            found=type(weight_map).__name__ if not isinstance(weight_map, dict) else "an empty one",
            action="Download or export the index again.",
        )
    checked = {name: require_plain_name(file, where=f"{where}, tensor {name}") for name, file in weight_map.items()}
    if SINGLE_FILE in names and SINGLE_FILE not in checked.values():
        raise ModelError(
            str(folder),
            expected=f"one set of weights: the index, or {SINGLE_FILE}",
            found=f"{SINGLE_FILE} beside an index that does not name it",
            action="Remove whichever of the two is stale.",
        )
    return checked


def _no_weights(folder: Path, names: list[str]) -> ModelError:
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    shards = [name for name in names if name.endswith(".safetensors")]
    expected = f"{SINGLE_FILE} or {INDEX_FILE}"
    if shards:
        action = f"Get {INDEX_FILE} as well: it says which shards belong together."
        return ModelError(str(folder), expected=expected, found=f"shards without it ({shards[0]}, ...)", action=action)
    if pickles:
        action = "Convert the weights to safetensors first; pickles can run code and are never loaded."
        return ModelError(str(folder), expected=expected, found=f"only pickled weights ({pickles[0]})", action=action)
    action = "Give a folder with safetensors weights."
    return ModelError(str(folder), expected=expected, found="no weights", action=action)


def _read_header(folder: Path, file: str) -> list[TensorInfo]:
    path = require_inside(folder, file)
    try:
        with path.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            header_bytes = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            limit = min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES)
            if file_bytes < LENGTH_BYTES or header_bytes > limit:
                raise ModelError(
                    str(path),
                    expected=f"a header that fits into the {file_bytes} bytes of the file and {MAX_HEADER_BYTES}",
                    found=f"a header of {header_bytes} bytes: the file is truncated or not safetensors",
                    action="Download or export the file again.",
                )
            header = stream.read(header_bytes)
    except OSError as error:
        raise _unreadable(path, error) from error
    return parse_header(header, file=file, file_bytes=file_bytes)


def _merge(tensors_by_file: Mapping[str, list[TensorInfo]]) -> dict[str, TensorInfo]:
    merged: dict[str, TensorInfo] = {}
    for file, tensors in tensors_by_file.items():
        for info in tensors:
            if info.name in merged:
                raise ModelError(
                    f"tensor {info.name}",
                    expected="one shard that holds it",
                    found=f"{merged[info.name].file} and {file}",
                    action="Download or export the checkpoint again.",
                )
            merged[info.name] = info
    return merged


def _require_same_names(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name in sorted(weight_map.keys() | tensors.keys()):
        in_index = weight_map.get(name, "not listed")
        in_shards = tensors[name].file if name in tensors else "in no shard"
        if in_index != in_shards:
            raise ModelError(
                f"{INDEX_FILE}, tensor {name}",
                expected=f"the shard that holds it ({in_shards})",
                found=in_index,
                action="Download or export index and shards again, together.",
            )


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(
        str(path), expected="a file that can be read", found=str(error), action="Change its permissions or copy it."
    )
