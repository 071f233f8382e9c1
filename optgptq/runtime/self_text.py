"""Text that a model writes itself, for calibration without any data.

Shapes: `W` windows, `S` positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.errors import TextError
from optgptq.memory import return_free_memory, smaller_batch
from optgptq.models.decoder import Decoder
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.llm import generate
from optgptq.runtime.results import GenerationResult
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
    warn: Callable[[str], None] | None = None,
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
        warn: takes a sentence for the user where memory ran out and fewer texts are written at a time.

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
    writer = _Writer(decoder, max_length=window_size + 1, warn=warn)
    wanted = num_windows * window_size
    stream: list[int] = []
    num_texts, count = 0, num_windows
    while len(stream) < wanted:
        # A text's randomness depends on its number alone, so the rounds do not show in the result.
        params = [writing.params(num_texts + index, max_tokens=window_size) for index in range(count)]
        for result in writer.write(start, params):
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


class _Writer:
    """An engine, and a new one with half as many texts at a time whenever memory runs out."""

    def __init__(self, decoder: Decoder, *, max_length: int, warn: Callable[[str], None] | None) -> None:
        self._decoder = decoder
        self._settings = EngineSettings(max_length=max_length, prefix_cache=False)
        self._running = _RUNNING
        self._warn = warn
        self._engine: Engine | None = None

    def write(self, start: int, params: Sequence[SamplingParams]) -> list[GenerationResult]:
        """Return one text for each of the parameters; what is written depends on them alone."""
        while True:
            try:
                self._engine = self._engine or self._start()
                return generate(self._engine, [[start]] * len(params), params)
            except (MemoryError, RuntimeError) as error:
                fewer = smaller_batch(error, self._running)
            self._engine = None
            return_free_memory()
            if self._warn is not None:
                self._warn(f"memory ran out: {fewer} instead of {self._running} texts are written at a time")
            self._running = fewer

    def _start(self) -> Engine:
        return Engine(self._decoder, None, replace(self._settings, max_running=self._running))


def _no_text(expected: str, found: str) -> TextError:
    return TextError(
        "text that the model writes itself",
        expected=expected,
        found=found,
        action="Name a text with calibration.source.",
    )
