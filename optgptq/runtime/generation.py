"""Writing text with a whole model in memory: prompts of equal length run as one batch over a contiguous cache.

Shapes: `R` prompts of a batch, `B` sequences computed, `S` positions, `M` model width, `V` vocabulary.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from optgptq.errors import UsageError
from optgptq.models.attention import attention_context
from optgptq.models.decoder import Decoder
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.kv_cache import KeyValueCache
from optgptq.runtime.sampling import SamplingSettings, choose_tokens, draw_uniforms

logger = logging.getLogger(__name__)

# Bounds the cache of one batch; more sequences than fit run one batch after the other.
_CACHE_BYTES = 1 << 30
# On a CPU: more rows add nothing to the speed of a matrix product, fewer lose half of it to everything around it.
_LARGEST_CPU_BATCH = 128
_SMALLEST_CPU_BATCH = 32


def generate(
    decoder: Decoder, prompts: Sequence[Sequence[int]], settings: SamplingSettings, *, num_threads: int | None = None
) -> list[list[int]]:
    """Continue every prompt and return the new tokens in the order of the prompts, an end token included.

    Args:
        decoder: the model; its weights may be dense or quantized.
        prompts: token ids; nothing is added to them.
        settings: how tokens are chosen.
        num_threads: batches that run at the same time on a CPU; None for torch's own number of threads.

    Raises:
        UsageError: an empty prompt, a token id outside the vocabulary, or more positions than the model has.
        NumericalError: the model gives logits that are not numbers.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        _check_prompt(decoder.spec, prompt, index, max_tokens=settings.max_tokens)
        by_length[len(prompt)].append(index)
    if prompts:
        _warn_of_positions(decoder.spec, max(by_length) + settings.max_tokens)
    batches = []
    for length, indices in sorted(by_length.items()):
        step = _sequences_per_batch(decoder, len(indices), num_positions=length + settings.max_tokens)
        batches += [indices[begin : begin + step] for begin in range(0, len(indices), step)]
    threads = 1 if decoder.device.type != "cpu" else num_threads or torch.get_num_threads()
    results: list[list[int]] = [[] for _ in prompts]
    for batch, new in zip(batches, _run(decoder, prompts, settings, batches, threads=threads), strict=True):
        for index, ids in zip(batch, new, strict=True):
            results[index] = ids
    return results


def _run(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    batches: list[list[int]],
    *,
    threads: int,
) -> list[list[list[int]]]:
    """Return the new tokens of every batch.

    One position of a small model is hundreds of operations of some microseconds. Split over threads they wait for each
    other more than they compute (ten times slower on two busy cores), so each thread takes whole batches.
    """
    stop = threading.Event()

    def run(batch: list[int]) -> list[list[int]]:
        uniform_BS = torch.cat([draw_uniforms(settings, index, 1) for index in batch])
        prompt_BS = torch.tensor([list(prompts[index]) for index in batch], dtype=torch.int64)
        return _continue_batch(decoder, prompt_BS, uniform_BS, settings, stop=stop)

    workers = min(threads, len(batches))
    if workers <= 1:
        return [run(batch) for batch in batches]
    previous = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                return list(pool.map(run, batches))
            finally:
                # Ctrl-C or an error in one batch: the others end after their current position.
                stop.set()
    finally:
        # The number of this thread has not changed, but that of threads started later has.
        torch.set_num_threads(previous)


def _sequences_per_batch(decoder: Decoder, count: int, *, num_positions: int) -> int:
    """Return how many of `count` sequences of `num_positions` run together, at least 1.

    On a CPU they are split evenly over an even number of batches, whatever the number of cores: the arithmetic, and
    with it the text, must not depend on that number.
    """
    spec = decoder.spec
    per_position = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * decoder.dtype.itemsize
    fitting = max(_CACHE_BYTES // (per_position * num_positions), 1)
    if decoder.device.type != "cpu":
        return fitting
    num_batches = 2 * -(-count // (2 * _LARGEST_CPU_BATCH))
    return min(fitting, max(-(-count // num_batches), _SMALLEST_CPU_BATCH))


def _check_prompt(spec: DecoderSpec, prompt: Sequence[int], index: int, *, max_tokens: int) -> None:
    where = f"prompt {index + 1}"
    if not prompt:
        raise UsageError(where, expected="at least one token", found="none", action="Give a prompt, or begin with BOS.")
    if min(prompt) < 0 or max(prompt) >= spec.vocab_size:
        raise UsageError(
            where,
            expected=f"token ids below the vocabulary size {spec.vocab_size}",
            found=str(max(prompt) if max(prompt) >= spec.vocab_size else min(prompt)),
            action="Use the tokenizer that belongs to the model.",
        )
    num_positions = len(prompt) + max_tokens
    limit = spec.num_learned_positions - spec.learned_offset if spec.num_learned_positions else None
    # The last new token is never read, so it needs no position.
    if limit is not None and num_positions - 1 > limit:
        raise UsageError(
            where,
            expected=f"prompt and new tokens within the model's {limit} positions",
            found=f"{len(prompt)} + {max_tokens} tokens",
            action="Ask for fewer new tokens, or shorten the prompt.",
        )


def _warn_of_positions(spec: DecoderSpec, num_positions: int) -> None:
    if spec.max_position is not None and num_positions - 1 > spec.max_position:
        logger.warning(
            "prompt and new tokens need %d positions, the model promises %d: the text gets worse beyond them",
            num_positions - 1,
            spec.max_position,
        )


def _continue_batch(
    decoder: Decoder,
    prompt_BS: torch.Tensor,
    uniform_BS: torch.Tensor,
    settings: SamplingSettings,
    *,
    stop: threading.Event,
) -> list[list[int]]:
    """Return the new tokens of a batch of prompts of equal length; incomplete once `stop` is set."""
    batch = _Batch.start(decoder, prompt_BS, settings)
    prompt_size, uniform_BS = prompt_BS.shape[1], uniform_BS.to(decoder.device)
    with torch.inference_mode():
        for position in range(prompt_size, prompt_size + settings.max_tokens):
            logits_BV = batch.next_logits(decoder, position)
            next_B = choose_tokens(logits_BV, uniform_BS[batch.rows_B, position - prompt_size], settings)
            batch.append(next_B, position)
            if stop.is_set() or (not settings.ignore_eos and batch.retire(next_B, position)):
                break
    return [row[prompt_size:end] for row, end in zip(batch.tokens_RS.tolist(), batch.ends_R.tolist(), strict=True)]


@dataclass(slots=True, eq=False, kw_only=True)
class _Batch:
    """Sequences that are written together. `R` counts all prompts, `B` those whose sequences are still computed.

    Attributes:
        tokens_RS: int64, prompts and what was written so far.
        ends_R: int64, where each text ends.
        rows_B: int64, which prompt each computed sequence belongs to.
        running_B: bool, false for sequences that ended but are still computed.
        eos: int64, the end tokens.
        cache: keys and values of the computed sequences.
    """

    tokens_RS: torch.Tensor
    ends_R: torch.Tensor
    rows_B: torch.Tensor
    running_B: torch.Tensor
    eos: torch.Tensor
    cache: KeyValueCache

    @classmethod
    def start(cls, decoder: Decoder, prompt_BS: torch.Tensor, settings: SamplingSettings) -> _Batch:
        """Return the batch before its first forward pass."""
        device, (count, prompt_size) = decoder.device, prompt_BS.shape
        limit = prompt_size + settings.max_tokens
        tokens_RS = torch.zeros((count, limit), dtype=torch.int64, device=device)
        tokens_RS[:, :prompt_size] = prompt_BS.to(device)
        return cls(
            tokens_RS=tokens_RS,
            ends_R=torch.full((count,), limit, dtype=torch.int64, device=device),
            rows_B=torch.arange(count, device=device),
            running_B=torch.ones(count, dtype=torch.bool, device=device),
            eos=torch.tensor(settings.eos_token_ids, dtype=torch.int64, device=device),
            cache=KeyValueCache(decoder.spec.num_layers),
        )

    def next_logits(self, decoder: Decoder, position: int) -> torch.Tensor:
        """Return the logits `[B, V]` for `position`, reading the tokens before it that the cache does not hold."""
        cache = self.cache
        if _rope_regime(decoder.spec, position) != _rope_regime(decoder.spec, cache.length):
            # The keys held were rotated with other frequencies than this length asks for.
            cache.clear()
        new_BS = self.tokens_RS[self.rows_B, cache.length : position]
        context = attention_context(
            decoder.spec,
            new_BS.shape[1],
            start=cache.length,
            dtype=decoder.dtype,
            device=decoder.device,
            attend=cache.attend,
        )
        hidden_BSM = decoder.hidden(new_BS, context)
        cache.advance(new_BS.shape[1])
        return decoder.head.logits(hidden_BSM[:, -1])

    def append(self, next_B: torch.Tensor, position: int) -> None:
        """Write one token per computed sequence."""
        self.tokens_RS[self.rows_B, position] = next_B

    def retire(self, next_B: torch.Tensor, position: int) -> bool:
        """Note which texts end with the token just written; return whether all have ended."""
        ended_B = torch.isin(next_B, self.eos) & self.running_B
        self.ends_R[self.rows_B[ended_B]] = position + 1
        self.running_B = self.running_B & ~ended_B
        num_running = int(self.running_B.sum())
        # Dropping rows copies the whole cache, so it waits until half of them are done.
        if 0 < num_running <= len(self.rows_B) // 2:
            kept = self.running_B.nonzero().squeeze(1)
            self.cache.keep_rows(kept)
            self.rows_B, self.running_B = self.rows_B[kept], self.running_B[kept]
        return num_running == 0


def _rope_regime(spec: DecoderSpec, num_positions: int) -> tuple[int, ...]:
    """Return what the rotary frequencies depend on besides the spec: equal tuples mean equal frequencies."""
    ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
    dynamic = sorted(max(num_positions, rope.max_position) for rope in ropes if rope.kind == "dynamic")
    longrope = sorted(int(num_positions > rope.original_max_position) for rope in ropes if rope.kind == "longrope")
    return (*dynamic, *longrope)
