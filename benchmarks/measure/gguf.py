"""A GGUF file of a Llama with random weights, as llama.cpp's own quantizer would lay it out for `Q4_0`.

Linears and the embedding are `Q4_0`, the head is `Q6_K`, norms are float32. The file has no vocabulary. The layout is
that of the GGUF specification, version 3: a header, keys with values, a line for each tensor, then the tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from measure.random_llama import LlamaShape

ALIGNMENT = 32
_MAGIC, _VERSION = b"GGUF", 3
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """How numbers are stored: `block_bytes` for `block` of them, each block with a float16 scale at `scale_at`."""

    number: int
    block: int
    block_bytes: int
    scale_at: int = 0
    scale: float = 1.0


FLOAT32 = BlockType(number=0, block=1, block_bytes=4)
# 32 codes of 4 bits less 8 behind their scale; the deviation of even codes is 4.6.
Q4_0 = BlockType(number=2, block=32, block_bytes=18, scale_at=0, scale=0.02 / 4.6)
# 256 codes of 6 bits less 32, 16 scales of 8 bits, then a scale of these.
Q6_K = BlockType(number=14, block=256, block_bytes=210, scale_at=208, scale=0.02 / 18.5 / 73.9)


def write_random_gguf(
    path: Path, shape: LlamaShape, *, num_layers: int, vocabulary: int, eps: float, seed: int = 0
) -> Path:
    """Write the file, unless it is there already; return its path."""
    if path.is_file():
        return path
    generator = np.random.default_rng(seed)
    tensors = list(_tensors(shape, num_layers, vocabulary))
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        values = list(_values(shape, num_layers, vocabulary, eps))
        file.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(values)) + b"".join(values))
        offset = 0
        for name, rows, columns, kind in tensors:
            sizes = (columns,) if rows == 0 else (columns, rows)
            line = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind.number, offset)
            file.write(_text(name) + line)
            offset += _padded(_num_bytes(rows, columns, kind))
        file.write(bytes(-file.tell() % ALIGNMENT))
        for _, rows, columns, kind in tensors:
            data = _random(generator, rows, columns, kind)
            file.write(data)
            file.write(bytes(_padded(len(data)) - len(data)))
    part.rename(path)
    return path


def _tensors(shape: LlamaShape, num_layers: int, vocabulary: int) -> Iterator[tuple[str, int, int, BlockType]]:
    """Yield names, rows (0 for a vector), columns and how they are stored."""
    width, feed_forward, values = shape.width, shape.feed_forward, shape.num_kv_heads * shape.head_size
    yield "token_embd.weight", vocabulary, width, Q4_0
    yield "output.weight", vocabulary, width, Q6_K
    yield "output_norm.weight", 0, width, FLOAT32
    for layer in range(num_layers):
        for name, rows, columns in (
            ("attn_q", width, width),
            ("attn_k", values, width),
            ("attn_v", values, width),
            ("attn_output", width, width),
            ("ffn_gate", feed_forward, width),
            ("ffn_up", feed_forward, width),
            ("ffn_down", width, feed_forward),
        ):
            yield f"blk.{layer}.{name}.weight", rows, columns, Q4_0
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", 0, width, FLOAT32


def _values(shape: LlamaShape, num_layers: int, vocabulary: int, eps: float) -> Iterator[bytes]:
    numbers = {
        "context_length": 2048,
        "embedding_length": shape.width,
        "block_count": num_layers,
        "feed_forward_length": shape.feed_forward,
        "rope.dimension_count": shape.head_size,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        "vocab_size": vocabulary,
    }
    yield _text("general.architecture") + struct.pack("<I", _STRING) + _text("llama")
    for name, number in numbers.items():
        yield _text(f"llama.{name}") + struct.pack("<II", _UINT32, number)
    for name, value in (("attention.layer_norm_rms_epsilon", eps), ("rope.freq_base", 10000.0)):
        yield _text(f"llama.{name}") + struct.pack("<If", _FLOAT32, value)
    yield _text("tokenizer.ggml.model") + struct.pack("<I", _STRING) + _text("none")


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _num_bytes(rows: int, columns: int, kind: BlockType) -> int:
    return max(rows, 1) * columns // kind.block * kind.block_bytes


def _random(generator: np.random.Generator, rows: int, columns: int, kind: BlockType) -> memoryview:
    """Return random codes, all with the same scale; ones for a vector."""
    if kind is FLOAT32:
        return memoryview(np.ones(columns, dtype=np.float32).tobytes())
    blocks: _Bytes = generator.integers(0, 256, (rows * columns // kind.block, kind.block_bytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(kind.scale).tobytes(), dtype=np.uint8)
    blocks[:, kind.scale_at : kind.scale_at + 2] = scale
    return memoryview(blocks.tobytes())
