"""The run record: one JSON file beside a checkpoint, its manifest plus what the manifest must not hold.

Format: `docs/formats/run-record.md`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import optgptq
from optgptq.checkpoint.folder import MAX_JSON_BYTES, read_json_object
from optgptq.checkpoint.manifest import MANIFEST_FILE, read_manifest, sha256_file
from optgptq.errors import FormatError, ModelError
from optgptq.memory import total_memory_bytes
from optgptq.reports.whole_file import write_whole
from optgptq.reports.wording import finite

RUN_RECORD_VERSION = 1
# What the manifest says of files is compared through its hash.
_NOT_COMPARED = frozenset({"files"})


# Keys that every record has, and their value where the job has nothing to say.
_EMPTY: Mapping[str, Any] = MappingProxyType(
    {
        "timings": {},
        "seconds": None,
        "peak_memory_bytes": None,
        "sessions": [],
        "phases": [],
        "decoder_layer_costs": [],
        "error_maps": [],
        "plan": None,
        "gates": [],
        "evaluation": None,
        "sample": None,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRecord:
    """A run record that was looked for.

    Attributes:
        content: empty where there is none that can be used.
        problem: why it cannot be used, a sentence; empty where all is well or where there is no file.
    """

    content: Mapping[str, Any]
    problem: str = ""


def record_path(output: Path) -> Path:
    """Return where the run record of a checkpoint lies unless the job was told otherwise."""
    output = output.absolute()
    return output.with_name(f"{output.name}.run.json")


def build_run_record(output: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of the published checkpoint `output`: its manifest, and what the job knows beside it.

    Args:
        output: the checkpoint; the record names its folder, no path.
        facts: any of the keys of a record, plain values; keys of the manifest in it win. Without `environment`, that of
            this process is taken.

    Raises:
        ModelError: the checkpoint has no manifest that can be read.
    """
    manifest = read_manifest(output)
    if manifest is None:
        raise ModelError(
            str(output),
            expected=f"a checkpoint with {MANIFEST_FILE}",
            found="no such file",
            action="Write the record after the checkpoint is published.",
        )
    record: dict[str, Any] = finite(
        {
            **manifest,
            **_EMPTY,
            **facts,
            "environment": facts.get("environment") or environment_record(str(manifest.get("device", "cpu"))),
            "run_record": RUN_RECORD_VERSION,
            "output": output.absolute().name,
            "manifest_sha256": sha256_file(output / MANIFEST_FILE),
        }
    )
    return record


def write_run_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record; `path` is the old file or the whole new one.

    Raises:
        CapacityError: the disk is full.
        OutputError: the file cannot be written.
    """
    write_whole(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_run_record(output: Path, path: Path | None = None) -> FoundRecord:
    """Return the record of a checkpoint: file `path`, or the one beside `output`.

    A record of another checkpoint is not used; the answer says so. So is a damaged one beside the output.

    Raises:
        FormatError: `path` is given, and is missing or no JSON object.
    """
    place = record_path(output) if path is None else path
    if path is None and not place.is_file():
        return FoundRecord(content={})
    try:
        content = read_json_object(place.absolute().parent, place.name)
    except ModelError as error:
        if path is None:
            return FoundRecord(content={}, problem=f"{place.name} cannot be read ({error.found}): it is left out.")
        raise FormatError(
            str(path),
            expected=f"a run record: a JSON object of at most {MAX_JSON_BYTES:,} bytes",
            found=error.found,
            action="Name the file that the job wrote, by default the output's name with .run.json.",
        ) from error
    if not _belongs(output, content):
        told = f"{place.name} is of another run than this checkpoint (their manifests differ): it is left out."
        return FoundRecord(content={}, problem=told)
    return FoundRecord(content=content)


def environment_record(device: str) -> dict[str, Any]:
    """Return what computes here: versions, processor, threads, memory; `device` as the job was given it."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
        "optgptq": optgptq.__version__,
        "platform": f"{platform.system()} {platform.release()}",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory_bytes(),
        "device": device,
    }


def _belongs(output: Path, record: Mapping[str, Any]) -> bool:
    """Tell by the hash of the manifest, or, in a record without one, by everything that both say."""
    manifest = read_manifest(output)
    if manifest is None:
        return False
    if "manifest_sha256" in record:
        return bool(record["manifest_sha256"] == sha256_file(output / MANIFEST_FILE))
    return all(record.get(key) == value for key, value in manifest.items() if key not in _NOT_COMPARED)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """Return the processor's name where the system tells it, else its architecture and instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
