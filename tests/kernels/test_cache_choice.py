"""Which attention over a quantized cache is taken, with a reason that says what is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.kv_cache import layer_schemes

from optgptq.kernels import fast_attention
from optgptq.kernels import quantized_attention as plain
from optgptq.kernels.cache_choice import choose_cache_attention
from optgptq.native import quantized_attention as native

SCHEMES = layer_schemes(64)
PLAIN = [SCHEMES["4 bits"], SCHEMES["keys only"]]
FAST = (torch.float32, torch.bfloat16, torch.float16)


def says(answer: bool) -> Callable[[torch.device, torch.dtype, object], bool]:
    return lambda device, dtype, schemes: answer


@pytest.mark.parametrize("dtype", FAST)
def test_processors_take_the_compiled_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "takes_cache", says(True))
    choice = choose_cache_attention(torch.device("cpu"), dtype, 64, PLAIN)
    assert (choice.name, choice.is_makeshift, choice.rows_are_independent) == ("native", False, True)
    assert choice.store is native.store
    assert choice.attend is native.attend
    assert "head dimension 64" in choice.reason


def test_without_the_compiled_one_torch_is_a_makeshift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "takes_cache", says(False))
    choice = choose_cache_attention(torch.device("cpu"), torch.float32, 64, PLAIN)
    assert (choice.name, choice.is_makeshift, choice.rows_are_independent) == ("torch", True, False)
    assert choice.store is plain.store
    assert choice.attend is plain.attend
    assert choice.reason.endswith("the compiled loops, which are faster, are not built")


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float16)])
def test_where_there_is_nothing_faster_torch_is_none(device: str, dtype: torch.dtype) -> None:
    choice = choose_cache_attention(torch.device(device), dtype, 64, PLAIN)
    assert (choice.name, choice.is_makeshift) == ("torch", False)
    assert choice.reason.endswith("the only one for this device and dtype")


def test_a_gpu_takes_triton_and_says_where_it_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    choice = choose_cache_attention(torch.device("cuda"), torch.bfloat16, 128, PLAIN)
    assert (choice.name, choice.is_makeshift, choice.can_be_recorded) == ("triton", False, True)
    wide = choose_cache_attention(torch.device("cuda"), torch.bfloat16, 320, PLAIN)
    assert (wide.name, wide.is_makeshift, wide.can_be_recorded) == ("torch", True, False)
    assert "heads of up to 256 features" in wide.reason
    monkeypatch.setattr(fast_attention, "find_spec", lambda name: None)
    choice = choose_cache_attention(torch.device("cuda"), torch.bfloat16, 128, PLAIN)
    assert (choice.name, choice.is_makeshift) == ("torch", True)
    assert "pip install optgptq[triton]" in choice.reason
