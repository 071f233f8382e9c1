"""Rotary position tables and their application.

Shapes: `B` sequences, `S` positions, `N` heads, `D` head dimension, `R` rotated features. Angles are float32.
Source: Su et al., RoFormer, arXiv 2104.09864, eq. 34, in the half-split layout of Llama; scaled kinds after
transformers `modeling_rope_utils.py` (llama3: Llama 3.1; yarn: arXiv 2309.00071; longrope: arXiv 2402.13753).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from optgptq.kernels.leaves import leaves_for
from optgptq.models.spec import RopeKind, RopeSpec
from optgptq.native.rotary import rotate_heads, rotates_heads

# Kinds whose frequencies depend on how long the text is.
LENGTH_DEPENDENT: tuple[RopeKind, ...] = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RopeTable:
    """Cosines and sines `[S, 1, R/2]` (or `[B, S, 1, R/2]`) in the dtype of the activations."""

    cosine: torch.Tensor
    sine: torch.Tensor


def rope_table(
    rope: RopeSpec, positions: torch.Tensor, *, dtype: torch.dtype, lengths: torch.Tensor | None = None
) -> RopeTable:
    """Return the table for `positions`, int64 `[S]` or `[B, S]`; computed in float32, then cast.

    Args:
        rope: the rotary spec.
        positions: where the tokens are.
        dtype: of the table.
        lengths: int64, shape of `positions`: the length of text that decides the frequencies of each token; None for
            the last position of all. Only `dynamic` and `longrope` look at it.
    """
    if lengths is None or rope.kind not in LENGTH_DEPENDENT:
        last = int(positions.max()) + 1 if rope.kind in LENGTH_DEPENDENT and positions.numel() else 1
        frequencies = inverse_frequencies(rope, num_positions=last).to(positions.device)
    else:
        distinct, which = torch.unique(_deciding_lengths(rope, lengths), return_inverse=True)
        rows = [inverse_frequencies(rope, num_positions=int(length)) for length in distinct]
        frequencies = torch.stack(rows).to(positions.device)[which]
    return table_of(rope, positions, frequencies, dtype=dtype)


def table_of(rope: RopeSpec, positions: torch.Tensor, frequencies: torch.Tensor, *, dtype: torch.dtype) -> RopeTable:
    """Return the table for `positions` with given frequencies, float32 `[R/2]` or one row for each position.

    Reads nothing back from the device.
    """
    angles = positions.float().unsqueeze(-1) * frequencies
    return RopeTable(
        cosine=(angles.cos() * rope.attention_factor).unsqueeze(-2).to(dtype),
        sine=(angles.sin() * rope.attention_factor).unsqueeze(-2).to(dtype),
    )


def _deciding_lengths(rope: RopeSpec, lengths: torch.Tensor) -> torch.Tensor:
    """Return lengths with the same frequencies as `lengths`, as few different ones as there can be."""
    if rope.kind == "dynamic":
        return lengths.clamp(min=rope.max_position)
    return rope.original_max_position + (lengths > rope.original_max_position).to(torch.int64)


def rotate_in_place(heads_BSND: torch.Tensor, table: RopeTable) -> None:
    """Rotate the leading features of every head; `heads_BSND` is overwritten.

    In place because the projections' outputs are fresh: 2 to 4 times faster on CPU than building new tensors.
    """
    if rotates_heads(heads_BSND, table.cosine, table.sine):
        rotate_heads(heads_BSND, table.cosine, table.sine)
        return
    half = table.cosine.shape[-1]
    first, second = heads_BSND[..., :half], heads_BSND[..., half : 2 * half]
    rotated = first * table.cosine
    rotated.addcmul_(second, table.sine, value=-1)
    second.mul_(table.cosine).addcmul_(first, table.sine)
    first.copy_(rotated)


def rotate(heads_BSND: torch.Tensor, table: RopeTable) -> torch.Tensor:
    """Return the heads with their leading features rotated; overwrites `heads_BSND` unless it needs a gradient."""
    if not heads_BSND.requires_grad:
        rotate_in_place(heads_BSND, table)
        return heads_BSND
    # Heads may be views of one fused projection, of which autograd lets none be written to.
    half = table.cosine.shape[-1]
    first, second, rest = heads_BSND[..., :half], heads_BSND[..., half : 2 * half], heads_BSND[..., 2 * half :]
    turned = first * table.cosine - second * table.sine, second * table.cosine + first * table.sine
    return torch.cat((*turned, rest), dim=-1)


def rotate_both(
    query_BSND: torch.Tensor, key_BSKD: torch.Tensor, table: RopeTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys rotated, as `rotate` does; on a GPU in one launch where their layout allows it."""
    leaves = leaves_for(query_BSND)
    one_table = query_BSND.shape[0] == 1 and table.cosine.dim() == 3
    if leaves is not None and one_table and _heads_adjoin(query_BSND) and _heads_adjoin(key_BSKD):
        leaves.rotate_in_place(query_BSND, key_BSKD, table.cosine, table.sine)
        return query_BSND, key_BSKD
    return rotate(query_BSND, table), rotate(key_BSKD, table)


def _heads_adjoin(heads_BSND: torch.Tensor) -> bool:
    """True if the heads of a token follow each other in memory."""
    return heads_BSND.stride(3) == 1 and heads_BSND.stride(2) == heads_BSND.shape[3]


def inverse_frequencies(rope: RopeSpec, *, num_positions: int) -> torch.Tensor:
    """Return float32 `[R/2]`; `num_positions` decides the regime of `dynamic` and `longrope`."""
    exponent = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    if rope.kind == "dynamic":
        return 1.0 / (_dynamic_theta(rope, num_positions) ** exponent)
    if rope.kind == "longrope":
        factors = rope.long_factor if num_positions > rope.original_max_position else rope.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponent)
    plain = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain)
    return plain


def _dynamic_theta(rope: RopeSpec, num_positions: int) -> float:
    length = max(num_positions, rope.max_position)
    growth = rope.factor * length / rope.max_position - (rope.factor - 1)
    return float(rope.theta * growth ** (rope.rotary_dim / (rope.rotary_dim - 2)))


def _llama3(rope: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    wavelength = 2 * math.pi / plain
    low = rope.original_max_position / rope.low_freq_factor
    high = rope.original_max_position / rope.high_freq_factor
    scaled = torch.where(wavelength > low, plain / rope.factor, plain)
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = (1 - blend) * scaled / rope.factor + blend * scaled
    return torch.where((wavelength >= high) & (wavelength <= low), smooth, scaled)


def _yarn(rope: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    low = _correction_dim(rope, rope.beta_fast)
    high = _correction_dim(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _correction_dim(rope: RopeSpec, rotations: float) -> float:
    return (rope.rotary_dim * math.log(rope.original_max_position / (rotations * 2 * math.pi))) / (
        2 * math.log(rope.theta)
    )
