"""The triton kernel that stores codes: run by the interpreter or a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.triton_runs import run_cases

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are no wheels but for Linux", allow_module_level=True)

CASES = Path(__file__).with_name("triton_store_codes_cases.py")


def test_every_case_passes_in_the_interpreter(tmp_path):
    run_cases(CASES, tmp_path, {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_every_case_passes_on_the_gpu(tmp_path):
    run_cases(CASES, tmp_path, {})
