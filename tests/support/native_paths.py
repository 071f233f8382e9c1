"""The compiled paths that this machine can run."""

from __future__ import annotations

import pytest

from optgptq.native.library import PATHS, load_library


def native_paths() -> list[object]:
    """Return every path as a parameter; those that are not there are skipped with the reason."""
    library = load_library()
    there = () if library is None else library.paths
    reason = "the compiled inner loops are not built" if library is None else "this processor lacks it"
    return [pytest.param(path, marks=pytest.mark.skipif(path not in there, reason=reason)) for path in PATHS]
