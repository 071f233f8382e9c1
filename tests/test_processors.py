"""Processors that a process may use, by affinity mask and control group."""

from __future__ import annotations

from pathlib import Path

import pytest

from optgptq.environment import explain_threads, limit_threads
from optgptq.processors import Processors, find_processors, num_cores, processor_quota


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_this_process_may_use_something() -> None:
    found = find_processors()
    assert 1 <= found.cores <= found.usable
    assert found.threads is None or 1 <= found.threads <= found.cores


@pytest.mark.parametrize(("text", "quota"), [("max 100000", None), ("150000 100000", 1.5), ("50000 100000", 0.5)])
def test_a_container_of_version_2(tmp_path: Path, text: str, quota: float | None) -> None:
    write(tmp_path / "own", "0::/\n")
    write(tmp_path / "groups/cpu.max", text + "\n")
    assert processor_quota(tmp_path / "groups", tmp_path / "own") == quota


def test_the_least_of_nested_groups_holds(tmp_path: Path) -> None:
    write(tmp_path / "own", "0::/a.slice/b.service\n")
    write(tmp_path / "groups/a.slice/cpu.max", "200000 100000")
    write(tmp_path / "groups/a.slice/b.service/cpu.max", "max 100000")
    write(tmp_path / "cpu.max", "1000 100000")  # above the mount: not a group
    assert processor_quota(tmp_path / "groups", tmp_path / "own") == 2.0


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_version_1_where_the_path_is_that_of_the_host(tmp_path: Path, mount: str) -> None:
    write(tmp_path / "own", "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n0::/\n")
    write(tmp_path / f"groups/{mount}/cpu.cfs_quota_us", "250000\n")
    write(tmp_path / f"groups/{mount}/cpu.cfs_period_us", "100000\n")
    assert processor_quota(tmp_path / "groups", tmp_path / "own") == 2.5
    write(tmp_path / f"groups/{mount}/cpu.cfs_quota_us", "-1\n")
    assert processor_quota(tmp_path / "groups", tmp_path / "own") is None


@pytest.mark.parametrize("text", ["", "nonsense", "100000 0", "x y", "1 2 3"])
def test_what_is_not_understood_is_no_quota(tmp_path: Path, text: str) -> None:
    write(tmp_path / "own", "0::/\n:::\nx\n")
    write(tmp_path / "groups/cpu.max", text)
    assert processor_quota(tmp_path / "groups", tmp_path / "own") is None
    assert processor_quota(tmp_path / "none", tmp_path / "none") is None


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"cpu{number}/topology/thread_siblings_list", f"{number % 2},{number % 2 + 2}\n")
    assert num_cores({0, 1, 2, 3}, tmp_path) == 2
    assert num_cores({0, 2}, tmp_path) == 1
    assert num_cores({0, 7}, tmp_path) == 2  # unknown: none is left out


@pytest.mark.parametrize(
    ("quota", "threads"), [(None, None), (0.2, 1), (1.5, 2), (2.0, 2), (3.5, 4), (4.0, None), (9.0, None)]
)
def test_threads_under_a_quota(quota: float | None, threads: int | None) -> None:
    assert Processors(usable=8, cores=4, quota=quota).threads == threads


def test_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optgptq.environment.find_processors", lambda: Processors(usable=8, cores=8, quota=2.5))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    limit_threads()
    assert explain_threads(Processors(usable=8, cores=8, quota=2.5)) == (
        "as OMP_NUM_THREADS=7 asks, though the control group grants 2.5 processors"
    )


def test_a_quota_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    limited, free = Processors(usable=8, cores=8, quota=2.5), Processors(usable=8, cores=8, quota=None)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # so that it is set back
        monkeypatch.delenv(name)
    monkeypatch.setattr("optgptq.environment.find_processors", lambda: free)
    limit_threads()
    assert explain_threads(free) == "one for each core that this process may use"
    monkeypatch.setattr("optgptq.environment.find_processors", lambda: limited)
    limit_threads()
    assert explain_threads(limited) == "OMP_NUM_THREADS=3, as the control group grants 2.5 processors"
