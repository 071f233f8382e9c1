"""Which positions of a calibration window count: not the padding, and where asked for a drawn share of the others.

Shapes: `B` windows of a batch, `S` positions, `M` model width.
"""

from __future__ import annotations

import torch


def window_lengths(valid_BS: torch.Tensor | None, inputs_BSM: torch.Tensor) -> list[int]:
    """Return the number of tokens of each window of `inputs_BSM`; `valid_BS` is False at padding.

    Raises:
        ValueError: padding does not follow the tokens of a window.
    """
    batch, num_positions = inputs_BSM.shape[:2]
    if valid_BS is None:
        return [num_positions] * batch
    lengths_B = valid_BS.sum(dim=1)
    leading_BS = torch.arange(num_positions, device=valid_BS.device) < lengths_B[:, None]
    if not torch.equal(valid_BS, leading_BS):
        raise ValueError("padding must follow the tokens of a window: later keys are never seen")
    return [int(length) for length in lengths_B]


def window_generator(seed: int, window: int) -> torch.Generator:
    """Return the generator of one window: what it draws does not depend on how windows are batched."""
    return torch.Generator().manual_seed(seed * 1_000_003 + window)


def drawn_positions(length: int, number: int, generator: torch.Generator) -> torch.Tensor:
    """Return `number` of `length` positions, int64, ascending and distinct: evenly spaced from a drawn beginning."""
    if number >= length:
        return torch.arange(length)
    offset = torch.rand(1, dtype=torch.float64, generator=generator)
    return ((torch.arange(number) + offset) * (length / number)).long().clamp_max(length - 1)
