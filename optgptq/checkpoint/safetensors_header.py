"""The header of a safetensors file: parsed, checked and built by us, so that a bad file is refused before it is read.

A file is: 8 bytes little-endian header length, the header (JSON, padded with spaces), the data without holes.
Source: the safetensors format description, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from optgptq.errors import ModelError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSION = 2**63 - 1
MAX_DIMENSIONS = 64

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "U16": torch.uint16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "I64": torch.int64,
        "U64": torch.uint64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "C64": torch.complex64,
    }
)
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in TORCH_DTYPES.items()})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor is stored.

    Attributes:
        name: tensor name.
        dtype: safetensors spelling, for example `BF16`.
        shape: stored shape.
        file: name of the weight file, relative to the folder.
        begin: offset of the first byte, from the start of the file.
        end: offset after the last byte, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def parse_header(header: bytes, *, file: str, file_bytes: int) -> list[TensorInfo]:
    """Return the tensors that `header` describes, in the order of their data.

    Args:
        header: the JSON part, without the length before it.
        file: file name for messages and records.
        file_bytes: size of the whole file.

    Raises:
        ModelError: not JSON, a bad entry, offsets that overlap, leave holes or do not end with the file.
    """
    content = _load_object(header, file)
    content.pop("__metadata__", None)
    data_begin = LENGTH_BYTES + len(header)
    tensors = [_tensor_info(name, entry, file, data_begin) for name, entry in content.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    position = data_begin
    for info in tensors:
        if info.begin != position:
            raise _bad_header(
                f"{file}, tensor {info.name}",
                expected=f"data that begins at byte {position}, where the tensor before it ends",
                found=f"byte {info.begin}",
            )
        position = info.end
    if position != file_bytes:
        kind = "truncated" if file_bytes < position else "followed by bytes that belong to no tensor"
        raise _bad_header(file, expected=f"{position} bytes", found=f"{file_bytes} bytes: the file is {kind}")
    return tensors


def build_header(entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return length and header of a file that holds `entries` in their order; the data begins at a multiple of 8."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in entries:
        end = position + math.prod(shape) * dtype.itemsize
        content[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def _load_object(header: bytes, file: str) -> dict[str, Any]:
    try:
        content = json.loads(header, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _bad_header(f"{file}, header", expected="JSON with unique keys", found=str(error)) from error
    if not isinstance(content, dict):
        raise _bad_header(f"{file}, header", expected="a JSON object", found=type(content).__name__)
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return content


def _tensor_info(name: str, entry: object, file: str, data_begin: int) -> TensorInfo:
    where = f"{file}, tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad_header(where, expected="an entry with dtype, shape and data_offsets", found=str(entry)[:200])
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise _bad_header(where, expected=f"a dtype among {', '.join(TORCH_DTYPES)}", found=str(dtype)[:200])
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _bad_header(
            where,
            expected="a shape and two offsets of integers from 0 up",
            found=f"shape {str(shape)[:200]}, data_offsets {str(offsets)[:200]}",
        )
    if len(shape) > MAX_DIMENSIONS:
        raise _bad_header(where, expected=f"at most {MAX_DIMENSIONS} dimensions", found=str(len(shape)))
    num_bytes = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise _bad_header(
            where, expected=f"{num_bytes} bytes for {dtype} {shape}", found=f"{offsets[1] - offsets[0]} bytes"
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_begin + offsets[0], data_begin + offsets[1])


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in value)


def _bad_header(where: str, *, expected: str, found: str) -> ModelError:
    return ModelError(where, expected=expected, found=found, action="Download or export the file again.")
