"""What both files of cases of the triton kernels for a quantized cache begin with."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from support.interpreted_triton import repair_bfloat16
from support.kv_cache import CacheStep
from support.paged import Part

from optgptq.kernels import quantized_attention as plain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LENGTHS = (1, 5, 17, 66, 100)
MIX: list[Part] = [(0, 0, 1), (4, 98, 100), (1, 3, 5), (2, 14, 17), (3, 65, 66)]


def repair_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take products in float64, rounded: in what order a library adds up float32 depends on the number of rows."""
    if not INTERPRETED:
        return
    repair_bfloat16(monkeypatch)
    product = np.matmul

    def wide_product(left: Any, right: Any) -> Any:
        return product(left.astype(np.float64), right.astype(np.float64)).astype(np.float32)

    monkeypatch.setattr(np, "matmul", wide_product)


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is never written, or read where it should not be, show up as NaN."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *sizes, **kinds: _poisoned(new_empty(*sizes, **kinds)))
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kinds: _poisoned(empty(*sizes, **kinds)))


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def stored(step: CacheStep) -> CacheStep:
    """Return a step whose new tokens are stored, by torch."""
    copy = step.copy()
    plain.store(*copy.arguments[1:])
    return copy
