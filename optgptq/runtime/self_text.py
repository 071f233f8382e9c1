"""Text that a model writes itself, for calibration without any data.

Shapes: `W` windows, `S` positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.errors import TextError
from optgptq.journal.store import NothingKept
from optgptq.memory import return_free_memory, smaller_batch
from optgptq.models.decoder import Decoder
from optgptq.models.inventory import model_linears, outer_linears
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.kept_texts import KeptTexts
from optgptq.runtime.llm import generate
from optgptq.scheduling.sampling_params import SamplingParams

# Texts at a time: more rows add nothing to the speed of a matrix product.
_RUNNING = 128
# What is written at a time is also what a stop costs. On a processor of two cores so many operations take a minute;
# below 32 rows its products lose more than an eighth of their speed. A GPU takes as long for one text as for all.
_PART_OPERATIONS = 6_000_000_000_000
_FEWEST = 32


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
    kept: KeptTexts | None = None,
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
        kept: parts of the text that were finished before, and where those that get finished now go.
        progress: called with tokens written and wanted, after each part.
        warn: takes a sentence for the user where memory ran out and fewer texts are written at a time.

    Raises:
        CapacityError, OutputError: a part cannot be kept.
        TextError: the model has neither a BOS nor an end token to start from, or it writes nothing but end tokens.
        NumericalError: the model gives logits that are not numbers.
    """
    # Some configs name end tokens that their vocabulary does not have.
    known = tuple(token for token in writing.eos_token_ids if token < decoder.spec.vocab_size)
    writing = replace(writing, eos_token_ids=known)
    start = bos_token_id if bos_token_id is not None else next(iter(known), None)
    if start is None:
        raise _no_text("a BOS or an end token to start from", "neither in tokenizer and config")
    kept = KeptTexts(NothingKept()) if kept is None else kept
    writer = _Writer(decoder, start, writing, window_size=window_size, kept=kept, warn=warn)
    stream = _joined(writer, num_windows, window_size, bos_token_id=bos_token_id, progress=progress)
    return torch.tensor(stream, dtype=torch.int64).view(num_windows, window_size)


def _joined(
    writer: _Writer,
    num_windows: int,
    window_size: int,
    *,
    bos_token_id: int | None,
    progress: Callable[[int, int], None] | None,
) -> list[int]:
    """Return as many tokens as the windows take, from as many texts as that takes."""
    wanted = num_windows * window_size
    stream: list[int] = []
    num_texts, count = 0, num_windows
    while len(stream) < wanted:
        # Nothing but finished texts decides how the next ones are divided, so a stop does not show in the parts.
        usual_length = min(-(-len(stream) // num_texts), window_size) if num_texts else window_size
        for texts in writer.parts(num_texts, count, usual_length=usual_length):
            for text in texts:
                if stream and bos_token_id is not None:
                    stream.append(bos_token_id)
                stream += text
            num_texts += len(texts)
            if progress is not None:
                progress(min(len(stream), wanted), wanted)
            if len(stream) >= wanted:
                break
        if len(stream) < 2 * num_texts:
            raise _no_text("text after the start token", f"{len(stream)} tokens in {num_texts} texts")
        missing = wanted - len(stream)
        count = -(-missing * num_texts // len(stream))
    return stream[:wanted]


class _Writer:
    """Writes texts part by part, with half as many at a time whenever memory runs out.

    A text's randomness depends on its number alone, but its logits are rounded as its company has it. A part always
    begins with an engine that has done nothing: so it is the same text whether those before it were written or read.
    """

    def __init__(
        self,
        decoder: Decoder,
        start: int,
        writing: SelfWriting,
        *,
        window_size: int,
        kept: KeptTexts,
        warn: Callable[[str], None] | None,
    ) -> None:
        self._decoder = decoder
        self._start = start
        self._writing = writing
        self._window_size = window_size
        self._kept = kept
        self._warn = warn
        self._engine: Engine | None = None
        self._num_parts = 0
        self._told: list[str] = []
        self._size = _part_size(decoder, window_size)
        self._running, told = kept.running() or (self._size, [])
        for sentence in told:
            self._tell(sentence)

    def parts(self, first: int, count: int, *, usual_length: int) -> Iterator[list[list[int]]]:
        """Yield the tokens of texts `first` to `first + count`, part by part; short texts make parts of more texts."""
        size = self._size * self._window_size // usual_length
        for begin in range(first, first + count, size):
            num_texts = min(size, first + count - begin)
            texts = self._kept.get(self._num_parts, num_texts)
            if texts is None:
                texts = self._write(range(begin, begin + num_texts))
                self._kept.put(self._num_parts, texts)
            self._num_parts += 1
            yield texts

    def _write(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the tokens of texts `numbers`."""
        params = [self._writing.params(number, max_tokens=self._window_size) for number in numbers]
        while True:
            try:
                engine = self._fresh_engine()
                results = generate(engine, [[self._start]] * len(params), params)
                break
            except (MemoryError, RuntimeError) as error:
                fewer = smaller_batch(error, self._running)
            self._engine = None
            return_free_memory()
            self._tell(f"memory ran out: {fewer} instead of {self._running} texts are written at a time")
            self._running = fewer
            self._kept.put_running(fewer, self._told)
        for result in results:
            if result.error is not None:
                raise result.error
        return [result.token_ids for result in results]

    def _fresh_engine(self) -> Engine:
        if self._engine is None:
            settings = EngineSettings(max_length=self._window_size + 1, prefix_cache=False, max_running=self._running)
            self._engine = Engine(self._decoder, None, settings)
        else:
            self._engine.reset()
        return self._engine

    def _tell(self, sentence: str) -> None:
        self._told.append(sentence)
        if self._warn is not None:
            self._warn(sentence)


def _part_size(decoder: Decoder, window_size: int) -> int:
    """Return how many texts of full length make a part."""
    if decoder.device.type != "cpu":
        return _RUNNING
    spec = decoder.spec
    num_weights = sum(linear.out_features * linear.in_features for linear in model_linears(spec))
    num_weights += sum(rows * columns for rows, columns in outer_linears(spec).values())
    return min(_RUNNING, max(_FEWEST, _PART_OPERATIONS // (2 * num_weights * window_size)))


def _no_text(expected: str, found: str) -> TextError:
    return TextError(
        "text that the model writes itself",
        expected=expected,
        found=found,
        action="Name a text with calibration.source.",
    )
