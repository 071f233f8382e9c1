"""The rotation that needs no calibration: a Hadamard matrix, in blocks where the head size is no power of two."""

from __future__ import annotations

import torch


def hadamard_block(head_dim: int) -> int:
    """Return the largest power of two that divides `head_dim`: the size of a block."""
    return head_dim & -head_dim


def block_hadamard(head_dim: int) -> torch.Tensor:
    """Return an orthogonal symmetric matrix `[D, D]`, float32: Sylvester's Hadamard matrices along the diagonal.

    Source: Sylvester 1867. Entries of a block of size `n` are `+-n^-1/2`, made in float64 and rounded once.
    """
    block = hadamard_block(head_dim)
    channel = torch.arange(block)
    shared = channel[:, None] & channel
    parity = torch.zeros_like(shared)
    while bool(shared.any()):
        parity ^= shared & 1
        shared = shared >> 1
    sylvester = (1.0 - 2.0 * parity.double()) * block**-0.5
    return torch.kron(torch.eye(head_dim // block, dtype=torch.float64), sylvester).float()
