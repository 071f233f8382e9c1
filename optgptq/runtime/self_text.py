"""Text that a model writes itself, for calibration without any data.

Shapes: `W` windows, `S` positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from optgptq.errors import TextError
from optgptq.models.decoder import Decoder
from optgptq.runtime.generation import generate
from optgptq.runtime.sampling import SamplingSettings


def write_windows(
    decoder: Decoder,
    num_windows: int,
    window_size: int,
    *,
    settings: SamplingSettings,
    bos_token_id: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return text that the model writes itself, int64 `[W, S]` on the CPU.

    Each text starts from the BOS token (from an end token where there is no BOS) and runs to its end token, or to
    `window_size` tokens. The texts are joined, end tokens included and a BOS token before each but the first where the
    model has one, and cut into windows.

    Args:
        decoder: the model.
        num_windows: windows to write.
        window_size: tokens per window.
        settings: temperature, seed and end tokens; `max_tokens` and `ignore_eos` are not looked at.
        bos_token_id: the model's BOS token or None.
        progress: called with tokens written and wanted, after each round of texts.

    Raises:
        TextError: the model has neither a BOS nor an end token to start from, or it writes nothing but end tokens.
    """
    start = bos_token_id if bos_token_id is not None else next(iter(settings.eos_token_ids), None)
    if start is None:
        raise _no_text("a BOS or an end token to start from", "neither in tokenizer and config")
    settings = replace(settings, max_tokens=window_size, ignore_eos=False)
    wanted = num_windows * window_size
    stream: list[int] = []
    num_texts, count = 0, num_windows
    while len(stream) < wanted:
        # A text's randomness depends on its number alone, so the rounds do not show in the result.
        texts = generate(decoder, [[start]] * count, replace(settings, seed=settings.seed + num_texts))
        for text in texts:
            if stream and bos_token_id is not None:
                stream.append(bos_token_id)
            stream += text
        num_texts += count
        if len(stream) < 2 * num_texts:
            raise _no_text("text after the start token", f"{len(stream)} tokens in {num_texts} texts")
        if progress is not None:
            progress(min(len(stream), wanted), wanted)
        missing = wanted - len(stream)
        count = -(-missing * num_texts // len(stream))
    return torch.tensor(stream[:wanted], dtype=torch.int64).view(num_windows, window_size)


def _no_text(expected: str, found: str) -> TextError:
    return TextError(
        "text that the model writes itself",
        expected=expected,
        found=found,
        action="Name a text with calibration.source.",
    )
