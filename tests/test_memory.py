"""Memory that ran out, whoever says so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optgptq.memory import is_out_of_memory, smaller_batch


def test_what_the_allocator_of_torch_raises_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried"),
    ],
    ids=repr,
)
def test_memory_ran_out(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), ValueError("can't allocate memory"), OSError(28, "No space left"), KeyError("a")],
    ids=repr,
)
def test_another_error_is_no_lack_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


@given(st.integers(2, 10_000))
def test_the_next_batch_is_half_of_the_last(size: int) -> None:
    assert smaller_batch(MemoryError(), size) == size // 2


@pytest.mark.parametrize(("error", "size"), [(MemoryError(), 1), (RuntimeError("shape mismatch"), 8)], ids=repr)
def test_where_nothing_smaller_helps_the_error_is_raised(error: Exception, size: int) -> None:
    with pytest.raises(type(error)) as caught:
        smaller_batch(error, size)
    assert caught.value is error
