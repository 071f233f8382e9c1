"""How fast this machine is: small measurements, kept in a file of the user's cache folder.

Every rate is what a second does: products of numbers (a multiplication and an addition), bytes, or numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812

from optgptq.calibration.moments import InputMoment
from optgptq.checkpoint.disk import disk_error
from optgptq.environment import cache_folder
from optgptq.models.linear import Linear
from optgptq.native.causal_attention import attends_causally, causal_attention
from optgptq.native.library import load_library
from optgptq.plain_numbers import is_number

_FILE = "machine.json"
_VERSION = 2
# A measurement that was made beside something else must not stay for ever.
_KEPT_SECONDS = 12 * 3600.0
_REPEATS = 3
_DISK_BYTES = 24 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """What the machine does in a second.

    Attributes:
        products: of a matrix product in the dtype of the activations.
        moment_products: of sums of `x x^T`, counted as if nothing were symmetric.
        factor_products: `I^3` of factoring a moment `[I, I]`.
        attention_products: `S^2 D` of causal attention.
        numbers: elementwise, read, changed and written, in the dtype of the activations.
        hashed_bytes: SHA-256.
    """

    products: float
    moment_products: float
    factor_products: float
    attention_products: float
    numbers: float
    hashed_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """Measurements by name, and when the first of them was made."""

    since: float
    measured: dict[str, dict[str, float]] = field(default_factory=dict)


class MachineFile:
    """Measurements by name, kept for half a day; a cache and no more.

    They are for this processor, this version of torch and of the package, and this number of threads.

    Args:
        folder: where the file is; None for the user's cache folder.
        forget: nothing that was kept is used.
        clock: seconds since any moment that stays the same from run to run.
    """

    def __init__(
        self, folder: Path | None = None, *, forget: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = (cache_folder() if folder is None else folder) / _FILE
        self._key = _machine_key()
        kept = _Kept(since=clock()) if forget else _read(self.path, self._key)
        is_fresh = kept is not None and 0 <= clock() - kept.since < _KEPT_SECONDS
        self._kept = kept if kept is not None and is_fresh else _Kept(since=clock())

    def get(self, name: str, measure: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """Return the numbers called `name`, measured now where they are not known; the file is a cache only."""
        measured = self._kept.measured
        if name not in measured:
            measured[name] = dict(measure())
            self._write()
        return measured[name]

    def _write(self) -> None:
        content = {"version": _VERSION, "machine": self._key, **asdict(self._kept)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{_FILE}")
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(name, self.path)
        except OSError:
            return


def machine_rates(kept: MachineFile, dtype: torch.dtype, device: torch.device) -> MachineRates:
    """Return what the machine does in a second, measured in about a third of one where it is not known."""
    found = kept.get(f"rates {dtype} {device.type}", lambda: asdict(measure_rates(dtype, device)))
    if set(found) != {field.name for field in fields(MachineRates)}:
        found = asdict(measure_rates(dtype, device))
    return MachineRates(**found)


def disk_rate(kept: MachineFile, folder: Path) -> float:
    """Return the bytes that a second writes to `folder` and forces to disk.

    Raises:
        CapacityError, OutputError: the folder cannot be written.
    """
    try:
        device = folder.stat().st_dev
    except OSError as error:
        raise disk_error(folder, error) from error
    return kept.get(f"disk {device}", lambda: {"bytes": _measure_disk(folder)})["bytes"]


def measure_rates(dtype: torch.dtype, device: torch.device) -> MachineRates:
    """Measure the rates of a device, each at a size that a decoder layer has."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, as_dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, as_dtype)

    inputs_TI, weight_OI = random(2048, 1024), random(1024, 1024)
    heads_1NSD = random(1, 8, 512, 64)
    square_II = random(512, 1024, as_dtype=torch.float32)
    square_II = square_II.T @ square_II + 1024 * torch.eye(1024, device=device)
    data = os.urandom(1 << 20) * 8

    heads, scale = (heads_1NSD,) * 3, heads_1NSD.shape[3] ** -0.5

    def attend() -> torch.Tensor:
        if attends_causally(*heads, scale=scale):
            return causal_attention(*heads, scale=scale)
        return F.scaled_dot_product_attention(*heads, is_causal=True)

    linear = Linear(weight_OI)
    moment = InputMoment(1024, dtype=torch.float32, device=device)
    return MachineRates(
        products=2048 * 1024**2 / _seconds(lambda: linear(inputs_TI), device),
        moment_products=2048 * 1024**2 / _seconds(lambda: moment.add(inputs_TI), device),
        factor_products=1024**3 / _seconds(lambda: torch.linalg.cholesky_ex(square_II.flip(0, 1)), device),
        attention_products=8 * 512**2 * 64 / _seconds(attend, device),
        numbers=inputs_TI.numel() / _seconds(lambda: F.silu(inputs_TI) * inputs_TI, device),
        hashed_bytes=len(data) / _seconds(lambda: hashlib.sha256(data).digest(), torch.device("cpu")),
    )


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Return what an action takes: the wall time, or the processor time of all threads where that is less.

    It is less where something else has the processor; then it is nearer to what an idle machine takes.
    """
    began, began_processor = time.perf_counter(), time.process_time()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter() - began
    return min(time.perf_counter() - began, time.process_time() - began_processor)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of a few runs, after one that warms up."""
    return max(min([seconds_of(action, device) for _ in range(_REPEATS + 1)][1:]), 1e-7)


def _measure_disk(folder: Path) -> float:
    data = os.urandom(1 << 20) * (_DISK_BYTES >> 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return len(data) / max(time.perf_counter() - began, 1e-6)
    except OSError as error:
        raise disk_error(folder, error) from error


def _machine_key() -> str:
    processor = platform.processor() or platform.machine()
    library = load_library()
    native = "nothing" if library is None else library.name
    threads = f"{torch.get_num_threads()} threads"
    return f"{platform.node()} {processor}, torch {torch.__version__}, native {native}, {threads}"


def _read(path: Path, key: str) -> _Kept | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("version") != _VERSION or content.get("machine") != key:
        return None
    since, measured = content.get("since"), content.get("measured")
    if not is_number(since) or not isinstance(measured, dict):
        return None
    rates = {
        str(name): {str(field): float(number) for field, number in values.items()}
        for name, values in measured.items()
        if isinstance(values, dict) and all(is_number(number) and number >= 0 for number in values.values())
    }
    return _Kept(since=since, measured=rates)
