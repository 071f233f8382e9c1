"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from optgptq.errors import UsageError
from optgptq.runtime.device import compute_dtype, require_device, usable_devices


def test_the_cpu_is_always_there():
    assert require_device("cpu") == torch.device("cpu")
    assert usable_devices()[0] == "cpu"


@pytest.mark.parametrize("name", ["nonsense", "cpu:x", "meta", "cuda:99", ""])
def test_what_is_no_device_of_this_machine_is_refused(name):
    with pytest.raises(UsageError) as caught:
        require_device(name)
    assert caught.value.where == f"device {name}"
    assert "cpu" in caught.value.expected


def test_float32_is_used_where_it_is_wanted_or_where_weights_are_float32():
    cpu = torch.device("cpu")
    assert compute_dtype(torch.bfloat16, cpu, wanted="float32") == torch.float32
    assert compute_dtype(torch.float32, cpu, wanted="auto") == torch.float32
    assert compute_dtype(torch.float16, torch.device("cuda"), wanted="auto") == torch.float16
    assert compute_dtype(torch.float16, cpu, wanted="auto") == torch.float32
