"""The least a device must read for one more token of one text, and how fast it reads: together, the least time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass

import torch

from optgptq.memory import available_memory_bytes
from optgptq.models.decoder import Decoder
from optgptq.runtime.cache_plan import CachePlan
from optgptq.runtime.layer_groups import plain_page_bytes

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


def decode_bytes(decoder: Decoder, cache: CachePlan | None = None, *, context: int) -> DecodeBytes:
    """Return the bytes of one token that sees `context` positions, as the weights and the cache are held."""
    embedding = decoder.embedding
    rest = held_bytes([layer.norms for layer in decoder.layers]) + embedding.tokens_VE[0].nbytes
    rest += held_bytes((embedding.norm, embedding.project_in_ME))
    rest += 0 if embedding.positions_PM is None else embedding.positions_PM[0].nbytes
    return DecodeBytes(
        linears=held_bytes([layer.linears for layer in decoder.layers]),
        head=held_bytes(decoder.head),
        cache=_cache_bytes(decoder, cache, context),
        rest=rest,
        context=context,
    )


def _cache_bytes(decoder: Decoder, cache: CachePlan | None, context: int) -> int:
    """Return the bytes of all keys and values that are seen; of a quantized cache first and last ones are exact."""
    spec, total = decoder.spec, 0.0
    plain = plain_page_bytes(spec, page_size=1, number_bytes=decoder.dtype.itemsize)
    layouts = (None,) * spec.num_layers if cache is None else cache.layouts
    kept = 0 if cache is None else cache.past.sink_tokens + cache.past.recent_tokens
    for layer, number_bytes, layout in zip(spec.layers, plain, layouts, strict=True):
        seen = min(context, layer.sliding_window or context)
        num_exact = seen if layout is None else min(seen, kept)
        total += num_exact * number_bytes
        total += 0 if layout is None else (seen - num_exact) * layout.bytes_per_token
    return round(total)


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
