"""The mean KL divergence of next-token distributions between two streams at the end of a model.

Shapes: `B` windows of a batch, `S` positions, `T` tokens, `M` model width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from optgptq.models.ends import Head

# Logits of a few positions at a time, 16 MB in float32.
_LOGITS_PER_CHUNK = 1 << 22


def mean_divergence(
    head: Head,
    expected: Iterable[torch.Tensor],
    found: Iterable[torch.Tensor],
    valid: Sequence[torch.Tensor | None],
) -> float:
    """Return the mean of `KL(expected || found)` in nats over the tokens of hidden states `[B, S, M]`."""
    total, count = 0.0, 0
    for expected_BSM, found_BSM, valid_BS in zip(expected, found, valid, strict=True):
        rows = (part.flatten(0, 1) if valid_BS is None else part[valid_BS] for part in (expected_BSM, found_BSM))
        expected_TM, found_TM = rows
        step = max(_LOGITS_PER_CHUNK // head.spec.vocab_size, 1)
        for begin in range(0, len(expected_TM), step):
            before_TV = torch.log_softmax(head.logits(expected_TM[begin : begin + step]), dim=-1)
            after_TV = torch.log_softmax(head.logits(found_TM[begin : begin + step]), dim=-1)
            difference_TV = before_TV - after_TV
            total += float((before_TV.exp() * difference_TV).sum(dtype=torch.float64))
        count += len(expected_TM)
    return total / max(count, 1)
