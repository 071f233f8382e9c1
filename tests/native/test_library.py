"""The shared object: found where it is, missed without noise where it is not."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from optgptq.native import library as library_module
from optgptq.native.library import PATHS, check_done, load_library, native_name


def test_a_missing_file_is_no_library(tmp_path: Path) -> None:
    assert load_library(tmp_path) is None


def test_a_file_that_does_not_load_is_no_library(tmp_path: Path) -> None:
    (tmp_path / f"_core{EXTENSION_SUFFIXES[-1]}").write_bytes(b"not a shared object")
    assert load_library(tmp_path) is None


def test_without_a_library_records_name_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "load_library", lambda: None)
    assert native_name() == "torch"


def test_the_portable_path_is_always_there_and_the_fastest_comes_first() -> None:
    library = load_library()
    if library is None:
        pytest.skip("the compiled inner loops are not built")
    assert library.paths[-1] == "portable"
    assert [name for name in PATHS if name in library.paths] == list(library.paths)
    assert native_name().split(",")[0] == library.paths[0]
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        assert "avx2" in library.paths


def test_an_instruction_set_that_is_not_there_is_refused_by_the_library() -> None:
    library = load_library()
    if library is None:
        pytest.skip("the compiled inner loops are not built")
    assert library.shared.optgptq_supported(99) == 0
    assert library.shared.optgptq_round_group(None, 4, 99, 1) != 0


def test_running_out_of_memory_is_said() -> None:
    with pytest.raises(MemoryError, match="no work space"):
        check_done(1)
    with pytest.raises(AssertionError):
        check_done(2)
    check_done(0)
