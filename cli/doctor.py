"""`optgptq doctor`: what this machine can do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from .options import JsonOption, QuietOption
from .output import human_bytes, table, write_json, write_result

if TYPE_CHECKING:
    from optgptq.reports.doctor import DoctorReport


def doctor(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Show versions, devices, threads, memory, free disk, and which kernel each operation will use."""
    from optgptq.reports.doctor import examine

    report = examine(Path.cwd())
    if as_json:
        write_json(dataclasses.asdict(report))
    elif not quiet:
        write_result(_page(report))


def _page(report: DoctorReport) -> str:
    available = report.available_memory_bytes
    memory = human_bytes(report.total_memory_bytes)
    if available is not None:
        memory += f", {human_bytes(available)} available"
    rows = [
        *report.versions.items(),
        ("system", report.system),
        ("processor", f"{report.cores} cores, torch uses {report.threads} threads: {report.threads_reason}"),
        ("memory", memory),
        ("free disk", f"{human_bytes(report.free_disk_bytes)} in {report.disk_folder}"),
        ("hub", "offline, as the environment asks" if report.offline else "downloads allowed"),
        *((f"device {name}", description) for name, description in report.devices.items()),
        *((f"{line.operation} on {line.device}", f"{line.name}: {line.reason}") for line in report.kernels),
    ]
    return table(rows)
