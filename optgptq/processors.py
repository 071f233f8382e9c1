"""How many processors this process may use: the affinity mask and the limit of its control group. No torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processors:
    """What this process may use.

    Attributes:
        usable: hardware threads in the affinity mask.
        cores: different cores of them, where the system tells which hardware threads share one; else `usable`.
        quota: processors' worth of time that the control group grants; None where it grants all.
    """

    usable: int
    cores: int
    quota: float | None

    @property
    def threads(self) -> int | None:
        """Threads to use under the quota, a last part of a processor counted whole; None where it limits nothing."""
        if self.quota is None or self.quota >= self.cores:
            return None
        return max(1, math.ceil(self.quota))


def find_processors() -> Processors:
    """Return what this process may use."""
    try:
        mask = os.sched_getaffinity(0)
    except AttributeError:  # not on macOS
        mask = set(range(os.cpu_count() or 1))
    return Processors(usable=len(mask), cores=num_cores(mask), quota=processor_quota())


def num_cores(mask: set[int], folder: Path = _CPUS) -> int:
    """Return how many cores the hardware threads of `mask` are on."""
    shared = {_text(folder / f"cpu{number}" / "topology" / "thread_siblings_list") for number in mask}
    return len(mask) if None in shared else len(shared)


def processor_quota(groups: Path = _GROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the least quota of this process's control group and those above it (version 1 and 2), in processors.

    In a container `own` may name a folder of the host, which is not there; the container's own is then `groups` itself.
    """
    quotas: list[float] = []
    for line in (_text(own) or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            mounts, read = (groups, groups / "unified"), _quota_2
        elif "cpu" in controllers.split(","):
            mounts, read = (groups / "cpu", groups / controllers), _quota_1
        else:
            continue
        for mount in mounts:
            inside = mount / path.strip("/")
            places = (inside, *(parent for parent in inside.parents if parent.is_relative_to(mount)))
            quotas.extend(quota for quota in map(read, places) if quota is not None)
    return min(quotas, default=None)


def _quota_2(folder: Path) -> float | None:
    words = (_text(folder / "cpu.max") or "").split()
    return _ratio(*words) if len(words) == 2 else None


def _quota_1(folder: Path) -> float | None:
    return _ratio(_text(folder / "cpu.cfs_quota_us") or "", _text(folder / "cpu.cfs_period_us") or "")


def _ratio(quota: str, period: str) -> float | None:
    """`max` and -1 are no limit."""
    limited = quota.isdigit() and period.isdigit() and int(period) > 0 and int(quota) > 0
    return int(quota) / int(period) if limited else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
