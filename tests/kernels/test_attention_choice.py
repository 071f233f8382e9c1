"""Which paged attention is taken: a function of device and dtype, with a reason that says what is lost."""

from __future__ import annotations

import pytest
import torch

from optgptq.kernels import fast_attention
from optgptq.kernels import paged_attention as plain
from optgptq.kernels.attention_choice import choose_attention
from optgptq.native import library as native_library
from optgptq.native import paged_attention as native

FAST = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.skipif(native_library.load_library() is None, reason="the native library was not built")
@pytest.mark.parametrize("dtype", FAST)
def test_processors_take_the_compiled_one(dtype: torch.dtype) -> None:
    choice = choose_attention(torch.device("cpu"), dtype, 64)
    assert (choice.name, choice.is_makeshift) == ("native", False)
    assert choice.attend is native.paged_attention
    assert choice.store is native.store_tokens
    assert "head dimension 64" in choice.reason


def test_without_the_compiled_one_torch_is_a_makeshift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_library", lambda: None)
    choice = choose_attention(torch.device("cpu"), torch.float32, 64)
    assert (choice.name, choice.is_makeshift) == ("torch", True)
    assert choice.attend is plain.paged_attention
    assert choice.store is plain.store_tokens
    assert choice.reason.endswith("the compiled loops, which are faster, are not built")


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float16)])
def test_where_there_is_nothing_faster_torch_is_none(device: str, dtype: torch.dtype) -> None:
    choice = choose_attention(torch.device(device), dtype, 64)
    assert (choice.name, choice.is_makeshift) == ("torch", False)


def test_a_gpu_takes_triton_and_says_where_it_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    choice = choose_attention(torch.device("cuda"), torch.bfloat16, 128)
    assert (choice.name, choice.is_makeshift, choice.can_be_recorded) == ("triton", False, True)
    wide = choose_attention(torch.device("cuda"), torch.bfloat16, 320)
    assert (wide.name, wide.is_makeshift, wide.can_be_recorded) == ("torch", True, False)
    assert "heads of up to 256 features" in wide.reason
    monkeypatch.setattr(fast_attention, "find_spec", lambda name: None)
    choice = choose_attention(torch.device("cuda"), torch.bfloat16, 128)
    assert (choice.name, choice.is_makeshift) == ("torch", True)
    assert "pip install optgptq[triton]" in choice.reason
