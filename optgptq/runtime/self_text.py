"""Text that a model writes itself, for calibration without any data.

Shapes: `W` windows, `S` positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from optgptq.errors import TextError
from optgptq.models.decoder import Decoder
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.llm import generate
from optgptq.scheduling.sampling_params import SamplingParams

# Texts at a time: more rows add nothing to the speed of a matrix product.
_RUNNING = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfWriting:
    """How the model chooses its tokens.

    Attributes:
        temperature: 1 samples from the model's own distribution.
        seed: text `i` is drawn with `seed + i`.
        eos_token_ids: tokens that end a text; they are part of it.
    """

    temperature: float = 1.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()

    def params(self, number: int, *, max_tokens: int) -> SamplingParams:
        """Return the parameters of text `number`."""
        return SamplingParams(
            temperature=self.temperature,
            seed=self.seed + number,
            max_tokens=max_tokens,
            stop_token_ids=self.eos_token_ids,
            detokenize=False,
        )


def write_windows(
    decoder: Decoder,
    num_windows: int,
    window_size: int,
    *,
    writing: SelfWriting,
    bos_token_id: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return text that the model writes itself, int64 `[W, S]` on the CPU.

    Each text starts from the BOS token (from an end token where there is no BOS) and runs to its end token, or to
    `window_size` tokens. The texts are joined, end tokens included and a BOS token before each but the first where the
    model has one, and cut into windows.

    Args:
        decoder: the model; its linears are fused in place.
        num_windows: windows to write.
        window_size: tokens per window.
        writing: how tokens are chosen.
        bos_token_id: the model's BOS token or None.
        progress: called with tokens written and wanted, after each round of texts.

    Raises:
        TextError: the model has neither a BOS nor an end token to start from, or it writes nothing but end tokens.
        NumericalError: the model gives logits that are not numbers.
    """
    # Some configs name end tokens that their vocabulary does not have.
    known = tuple(token for token in writing.eos_token_ids if token < decoder.spec.vocab_size)
    writing = replace(writing, eos_token_ids=known)
    start = bos_token_id if bos_token_id is not None else next(iter(known), None)
    if start is None:
        raise _no_text("a BOS or an end token to start from", "neither in tokenizer and config")
    settings = EngineSettings(max_length=window_size + 1, max_running=_RUNNING, prefix_cache=False)
    engine = Engine(decoder, None, settings)
    wanted = num_windows * window_size
    stream: list[int] = []
    num_texts, count = 0, num_windows
    while len(stream) < wanted:
        # A text's randomness depends on its number alone, so the rounds do not show in the result.
        params = [writing.params(num_texts + index, max_tokens=window_size) for index in range(count)]
        for result in generate(engine, [[start]] * count, params):
            if result.error is not None:
                raise result.error
            if stream and bos_token_id is not None:
                stream.append(bos_token_id)
            stream += result.token_ids
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
