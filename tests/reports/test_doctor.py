"""The machine as the toolkit sees it."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import optgptq
from optgptq import memory
from optgptq.native.dense_products import has_dense_products
from optgptq.native.library import Library, load_library
from optgptq.reports import doctor
from optgptq.reports.doctor import examine


def test_the_report_says_what_this_process_has(tmp_path):
    report = examine(tmp_path)
    assert report.versions["optgptq"] == optgptq.__version__
    assert report.versions["torch"] == torch.__version__
    assert report.threads == torch.get_num_threads()
    assert report.threads_reason
    assert report.cores >= 1
    assert report.free_disk_bytes > 0
    assert report.devices["cpu"]
    first = report.kernels[0]
    assert (first.operation, first.device) == ("affine_matmul", "cpu")
    assert (first.name == "reference") == (load_library() is None)
    planes = [line for line in report.kernels if line.operation == "binary_matmul"]
    assert planes[0].device == "cpu"
    assert (planes[0].name == "torch") == (load_library() is None)
    (attention,) = [line for line in report.kernels if line.operation == "paged_attention" and line.device == "cpu"]
    assert attention.name == ("torch" if load_library() is None else "native")
    (dense,) = [line for line in report.kernels if line.operation == "dense_matmul"]
    others = ("packed", "torch")
    assert dense.name == "native" if has_dense_products() else dense.name in others


def test_the_report_says_who_runs_the_inner_loops(tmp_path, monkeypatch):
    library = Library(shared=None, paths=("avx2", "portable"), bfloat16_products=False)
    monkeypatch.setattr(doctor, "load_library", lambda: library)
    walk, moment = examine(tmp_path).kernels[-2:]
    assert (walk.operation, walk.name) == ("gptq_walk", "avx2")
    assert "avx2, portable" in walk.reason
    assert (moment.operation, moment.name) == ("input_moment", "torch")
    assert "AVX512_BF16 is not there" in moment.reason
    monkeypatch.setattr(doctor, "load_library", lambda: replace(library, bfloat16_products=True))
    assert examine(tmp_path).kernels[-1].name == "avx512_bf16"


def test_the_report_says_what_is_lost_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "load_library", lambda: None)
    walk, moment = examine(tmp_path).kernels[-2:]
    assert (walk.name, moment.name) == ("torch", "torch")
    assert "several times as long" in walk.reason
    assert "compiler" in walk.reason
    assert "twice the time" in moment.reason


@pytest.mark.parametrize(("shares", "name"), [(True, "torch"), (False, "own")])
def test_the_report_says_whose_threads_compiled_loops_take(tmp_path, monkeypatch, shares, name):
    library = Library(shared=None, paths=("portable",), bfloat16_products=False, shares_threads=shares)
    monkeypatch.setattr(doctor, "load_library", lambda: library)
    (line,) = [line for line in examine(tmp_path).kernels if line.operation == "threads"]
    assert line.name == name


def test_offline_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert examine(tmp_path).offline
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert not examine(tmp_path).offline


def test_peak_memory_grows_with_what_is_touched():
    before = memory.peak_memory_bytes()
    # More than what earlier tests have given back, since a peak is never taken back; and pages of the test's own, since
    # the allocator may hold memory that was touched before.
    num_bytes = before - (memory.resident_memory_bytes() or before) + 64_000_000
    with mmap.mmap(-1, num_bytes) as pages:
        pages[:: mmap.PAGESIZE] = bytes(len(range(0, num_bytes, mmap.PAGESIZE)))
        assert memory.peak_memory_bytes() > before
        resident = memory.resident_memory_bytes()
        assert resident is None or resident >= num_bytes
    assert memory.total_memory_bytes() >= memory.peak_memory_bytes()


def test_available_memory_is_bounded_by_the_control_group(monkeypatch):
    values = {"memory.max": 1000, "memory.current": 400}
    monkeypatch.setattr(memory, "_control_group_bytes", values.get)
    assert memory.available_memory_bytes() == 600
    monkeypatch.setattr(memory, "_proc_bytes", lambda path, field: None)
    assert memory.available_memory_bytes() == 600
    values.clear()
    assert memory.available_memory_bytes() is None


def test_a_field_that_is_missing_is_none(tmp_path):
    assert memory._proc_bytes(Path(tmp_path / "none"), "VmHWM") is None
    (tmp_path / "status").write_text("Name: x\nVmHWM:   12 kB\n")
    assert memory._proc_bytes(tmp_path / "status", "VmHWM") == 12 * 1024
    assert memory._proc_bytes(tmp_path / "status", "VmRSS") is None
