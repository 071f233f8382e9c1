"""Activation functions by the names that configs use. Each may overwrite an input that needs no gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch.nn import functional as F  # noqa: N812

Activation = Callable[[torch.Tensor], torch.Tensor]


def _silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x, inplace=not x.requires_grad)


def _relu(x: torch.Tensor) -> torch.Tensor:
    return x.relu() if x.requires_grad else x.relu_()


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": _silu,
        "swish": _silu,
        "relu": _relu,
        "gelu": _gelu,
        "gelu_python": _gelu,
        "gelu_new": _gelu_tanh,
        "gelu_fast": _gelu_tanh,
        "gelu_pytorch_tanh": _gelu_tanh,
        "gelu_python_tanh": _gelu_tanh,
        "quick_gelu": _quick_gelu,
    }
)
