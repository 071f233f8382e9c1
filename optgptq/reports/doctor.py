"""What this machine can do: versions, devices, memory, disk, and the kernel that each operation will use."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import optgptq
from optgptq.environment import explain_threads, read_environment
from optgptq.kernels import KernelChoice, choose_affine_matmul, choose_binary_matmul
from optgptq.kernels.attention_choice import choose_attention
from optgptq.kernels.packed_dense import packs
from optgptq.memory import available_memory_bytes, total_memory_bytes
from optgptq.native.dense_products import has_dense_products
from optgptq.native.library import load_library
from optgptq.processors import find_processors

# That of most models.
_HEAD_DIM = 128
_PACKAGES = (
    "torch",
    "safetensors",
    "tokenizers",
    "transformers",
    "datasets",
    "huggingface-hub",
    "numpy",
    "triton",
    "pydantic",
    "compressed-tensors",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLine:
    """Which implementation an operation uses on a device, and why."""

    operation: str
    device: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """The machine as the toolkit sees it.

    Attributes:
        versions: package name to version; a package that is not installed is left out.
        system: operating system and processor.
        cores: processor cores that this process may use.
        threads: threads that torch uses for one operation.
        threads_reason: where that number comes from.
        total_memory_bytes, available_memory_bytes: memory; None where the system does not tell.
        free_disk_bytes: free space for this user in `disk_folder`.
        disk_folder: the folder that was looked at.
        devices: names for `--device`, with a description each.
        kernels: one line per operation and kind of device.
        offline: whether the environment forbids downloads.
    """

    versions: dict[str, str]
    system: str
    cores: int
    threads: int
    threads_reason: str
    total_memory_bytes: int
    available_memory_bytes: int | None
    free_disk_bytes: int
    disk_folder: str
    devices: dict[str, str]
    kernels: tuple[KernelLine, ...]
    offline: bool


def examine(folder: Path) -> DoctorReport:
    """Return the report; `folder` is where free disk space is looked up."""
    devices, processors = _devices(), find_processors()
    kinds = {name.split(":")[0]: name for name in reversed(devices)}
    products = [
        _kernel_line(name, choose)
        for choose in (choose_affine_matmul, choose_binary_matmul)
        for name in reversed(kinds.values())
    ]
    attention = [_attention_line(name) for name in reversed(kinds.values())]
    return DoctorReport(
        versions=_versions(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cores=processors.usable,
        threads=torch.get_num_threads(),
        threads_reason=explain_threads(processors),
        total_memory_bytes=total_memory_bytes(),
        available_memory_bytes=available_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(folder).free,
        disk_folder=str(folder),
        devices=devices,
        kernels=(*products, *attention, _dense_line(), _threads_line(), _solver_line(), _moment_line()),
        offline=read_environment().offline,
    )


def _versions() -> dict[str, str]:
    versions = {"optgptq": optgptq.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{torch.backends.cpu.get_cpu_capability()} instructions"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return devices


def _kernel_line(device: str, choose: Callable[[torch.device, torch.dtype], KernelChoice[Any]]) -> KernelLine:
    place = torch.device(device)
    # Models run in a 16-bit type on a GPU, and mostly in float32 on a processor.
    choice = choose(place, torch.float32 if place.type == "cpu" else torch.float16)
    return KernelLine(operation=choice.operation, device=device, name=choice.name, reason=choice.reason)


def _attention_line(device: str) -> KernelLine:
    place = torch.device(device)
    choice = choose_attention(place, torch.float32 if place.type == "cpu" else torch.float16, _HEAD_DIM)
    return KernelLine(operation="paged_attention", device=device, name=choice.name, reason=choice.reason)


def _dense_line() -> KernelLine:
    if has_dense_products():
        reason = "dense products with weights laid out once: bfloat16 by compiled loops, float32 by torch"
        return KernelLine(operation="dense_matmul", device="cpu", name="native", reason=reason)
    if packs(torch.device("cpu"), torch.float32):
        reason = "dense products of a running model with weights laid out once, by oneDNN"
        return KernelLine(operation="dense_matmul", device="cpu", name="packed", reason=reason)
    reason = "dense products by torch, which lays weights out again at each call: this build has no oneDNN"
    return KernelLine(operation="dense_matmul", device="cpu", name="torch", reason=reason)


def _threads_line() -> KernelLine:
    library = load_library()
    if library is None or library.shares_threads:
        reason = "all operations take the threads of torch's own OpenMP library"
        return KernelLine(operation="threads", device="cpu", name="torch", reason=reason)
    reason = "torch's OpenMP library was not found, so compiled loops have threads of their own, as many as torch"
    return KernelLine(operation="threads", device="cpu", name="own", reason=reason)


def _solver_line() -> KernelLine:
    library = load_library()
    if library is None:
        return KernelLine(
            operation="gptq_walk",
            device="cpu",
            name="torch",
            reason="the compiled inner loops are not there, so a solve takes several times as long, and so do products "
            "with codes and attention over pages of a running model; with a C++ compiler (g++ or clang++) on the path "
            "install the package again: pip install --force-reinstall --no-deps",
        )
    reason = f"compiled inner loops; this processor runs {', '.join(library.paths)}"
    return KernelLine(operation="gptq_walk", device="cpu", name=library.paths[0], reason=reason)


def _moment_line() -> KernelLine:
    library = load_library()
    if library is None or not library.bfloat16_products:
        missing = "the compiled inner loops are" if library is None else "the processor's instruction AVX512_BF16 is"
        reason = f"{missing} not there, so sums over bfloat16 inputs are float32 products, at about twice the time"
        return KernelLine(operation="input_moment", device="cpu", name="torch", reason=reason)
    reason = "sums over bfloat16 inputs by the processor's own instruction; other inputs by torch"
    return KernelLine(operation="input_moment", device="cpu", name="avx512_bf16", reason=reason)
