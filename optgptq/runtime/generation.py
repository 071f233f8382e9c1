"""Writing text with a whole model in memory: prompts of equal length run as one batch over a contiguous cache.

Shapes: `R` prompts of a batch, `B` sequences computed, `S` positions, `M` model width, `V` vocabulary.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.errors import TextError, UsageError
from optgptq.models.attention import attention_context
from optgptq.models.decoder import Decoder
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.kv_cache import KeyValueCache
from optgptq.runtime.sampling import SamplingSettings, choose_tokens, draw_uniforms

logger = logging.getLogger(__name__)

# Bounds the cache of one batch; more sequences than fit run one batch after the other.
_CACHE_BYTES = 1 << 30

StepListener = Callable[[int, int], None]


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    progress: StepListener | None = None,
) -> list[list[int]]:
    """Continue every prompt and return the new tokens in the order of the prompts, an end token included.

    Args:
        decoder: the model; its weights may be dense or quantized.
        prompts: token ids; nothing is added to them.
        settings: how tokens are chosen.
        progress: called with new positions done and in all, for the batch that runs.

    Raises:
        UsageError: an empty prompt, a token id outside the vocabulary, or more positions than the model has.
        NumericalError: the model gives logits that are not numbers.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        _check_prompt(decoder.spec, prompt, index, max_tokens=settings.max_tokens)
        by_length[len(prompt)].append(index)
    results: list[list[int]] = [[] for _ in prompts]
    for length, indices in sorted(by_length.items()):
        step = sequences_per_batch(decoder, length + settings.max_tokens)
        for begin in range(0, len(indices), step):
            batch = indices[begin : begin + step]
            uniform_BS = torch.cat([draw_uniforms(settings, index, 1) for index in batch])
            tokens = torch.tensor([list(prompts[index]) for index in batch], dtype=torch.int64)
            new = _continue_batch(decoder, tokens, uniform_BS, settings, progress=progress)
            for index, ids in zip(batch, new, strict=True):
                results[index] = ids
    return results


def write_windows(
    decoder: Decoder,
    num_windows: int,
    window_size: int,
    *,
    settings: SamplingSettings,
    bos_token_id: int | None,
    progress: StepListener | None = None,
) -> torch.Tensor:
    """Return text that the model writes itself, int64 `[num_windows, window_size]` on the CPU.

    Every window starts from the BOS token (from the end token where there is no BOS), which is not part of it. After
    an end token inside a window the BOS token follows, where the model has one, and a new text begins.

    Args:
        decoder: the model.
        num_windows: windows to write.
        window_size: tokens per window.
        settings: temperature, seed and end tokens; `max_tokens` and `ignore_eos` are not looked at.
        bos_token_id: the model's BOS token or None.
        progress: called with new positions done and in all, for the batch that runs.

    Raises:
        TextError: the model has neither a BOS nor an end token to start from.
    """
    start = bos_token_id if bos_token_id is not None else next(iter(settings.eos_token_ids), None)
    if start is None:
        raise TextError(
            "text that the model writes itself",
            expected="a BOS or an end token to start from",
            found="neither in tokenizer and config",
            action="Name a text with calibration.source.",
        )
    _check_prompt(decoder.spec, [start], 0, max_tokens=window_size)
    settings = replace(settings, max_tokens=window_size, ignore_eos=True)
    windows = []
    step = sequences_per_batch(decoder, window_size + 1)
    for begin in range(0, num_windows, step):
        count = min(step, num_windows - begin)
        windows += _continue_batch(
            decoder,
            torch.full((count, 1), start, dtype=torch.int64),
            draw_uniforms(settings, begin, count),
            settings,
            restart_token=bos_token_id,
            progress=progress,
        )
    return torch.tensor(windows, dtype=torch.int64)


def sequences_per_batch(decoder: Decoder, num_positions: int) -> int:
    """Return how many sequences of `num_positions` run together within the bound on the cache, at least 1."""
    spec = decoder.spec
    per_position = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * decoder.dtype.itemsize
    return max(_CACHE_BYTES // (per_position * num_positions), 1)


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
    if limit is None and spec.max_position is not None and num_positions > spec.max_position:
        logger.warning(
            "prompt and new tokens need %d positions; the model promises %d", num_positions, spec.max_position
        )


def _continue_batch(
    decoder: Decoder,
    prompt_BS: torch.Tensor,
    uniform_BS: torch.Tensor,
    settings: SamplingSettings,
    *,
    restart_token: int | None = None,
    progress: StepListener | None = None,
) -> list[list[int]]:
    """Return the new tokens of a batch of prompts of equal length.

    `restart_token` follows every end token, whatever the model would have written.
    """
    batch = _Batch.start(decoder, prompt_BS, settings)
    prompt_size, uniform_BS = prompt_BS.shape[1], uniform_BS.to(decoder.device)
    with torch.inference_mode():
        for position in range(prompt_size, prompt_size + settings.max_tokens):
            logits_BV = batch.next_logits(decoder, position)
            next_B = choose_tokens(logits_BV, uniform_BS[batch.rows_B, position - prompt_size], settings)
            if restart_token is not None and position > prompt_size:
                after_end_B = torch.isin(batch.tokens_RS[batch.rows_B, position - 1], batch.eos)
                next_B = next_B.masked_fill(after_end_B, restart_token)
            batch.append(next_B, position)
            if progress is not None:
                progress(position + 1 - prompt_size, settings.max_tokens)
            if not settings.ignore_eos and batch.retire(next_B, position):
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
            cache=KeyValueCache(decoder.spec.num_layers, capacity=limit),
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
