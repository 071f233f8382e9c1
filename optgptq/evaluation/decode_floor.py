"""The least a device must read for one more token of one text, and how fast it reads: together, the least time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass

import torch

from optgptq.memory import available_memory_bytes
from optgptq.models.decoder import Decoder
from optgptq.runtime.memory_plan import layer_groups

# Far larger than the caches of one processor or GPU.
_BUFFER_BYTES = 512 << 20
_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBytes:
    """Bytes that are read for one token of one text.

    Attributes:
        linears: of the decoder layers: codes or dense weights, scales, zero points, biases.
        head: output projection, with what is around it.
        cache: keys and values of all positions that the token sees.
        rest: norms, the token's row of the embedding.
        context: positions that the token sees.
    """

    linears: int
    head: int
    cache: int
    rest: int
    context: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linears + self.head + self.cache + self.rest


def decode_bytes(decoder: Decoder, *, context: int) -> DecodeBytes:
    """Return the bytes of one token that sees `context` positions, as the weights are held."""
    embedding, spec = decoder.embedding, decoder.spec
    rest = held_bytes([layer.norms for layer in decoder.layers]) + embedding.tokens_VE[0].nbytes
    rest += held_bytes((embedding.norm, embedding.project_in_ME))
    rest += 0 if embedding.positions_PM is None else embedding.positions_PM[0].nbytes
    # Groups of layers with pages of one token: the bytes of a position in their keys and values.
    groups = layer_groups(spec, page_size=1, number_bytes=decoder.dtype.itemsize, max_length=context, max_step_tokens=1)
    return DecodeBytes(
        linears=held_bytes([layer.linears for layer in decoder.layers]),
        head=held_bytes(decoder.head),
        cache=sum(group.page_bytes * min(context, group.window or context) for group in groups),
        rest=rest,
        context=context,
    )


def held_bytes(held: object) -> int:
    """Return the bytes of all tensors in a record, or in records inside it; one that is there twice counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(held, {}).values())


def _tensors(held: object, found: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    if isinstance(held, torch.Tensor):
        found[id(held)] = held
    elif isinstance(held, Mapping):
        for item in held.values():
            _tensors(item, found)
    elif isinstance(held, list | tuple):
        for item in held:
            _tensors(item, found)
    elif is_dataclass(held) and not isinstance(held, type):
        for field in fields(held):
            _tensors(getattr(held, field.name), found)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """How fast a device reads its memory.

    Attributes:
        bytes_per_second: the faster of a sum over a buffer (read) and a copy of it (read and written).
        method: which of the two that was, and the size of the buffer.
    """

    bytes_per_second: float
    method: str


def measure_bandwidth(device: torch.device, *, num_bytes: int | None = None) -> Bandwidth:
    """Measure with a buffer of `num_bytes`, by default 512 MiB or what an eighth of the free memory allows."""
    if num_bytes is None:
        num_bytes = min(_BUFFER_BYTES, _free_bytes(device) // 8)
    numbers = torch.zeros(max(num_bytes // 4, 1), device=device)
    copy = torch.empty_like(numbers)
    used = numbers.nbytes
    reading, copying = (_best_seconds(call, device) for call in (numbers.sum, lambda: copy.copy_(numbers)))
    speeds = {"a sum over": used / reading, "a copy of": 2 * used / copying}
    best = max(speeds, key=lambda name: speeds[name])
    return Bandwidth(bytes_per_second=speeds[best], method=f"{best} {used / 2**20:.0f} MiB, the best of {_REPEATS}")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = available_memory_bytes()
    return 8 * _BUFFER_BYTES if available is None else available


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    def timed() -> float:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    timed()
    return min(timed() for _ in range(_REPEATS))
