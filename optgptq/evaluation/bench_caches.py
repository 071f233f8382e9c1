"""Engines on one model that store keys and values in different ways, in the same memory each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from optgptq.errors import UsageError
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import CACHE_CHOICES, PLAIN_CACHE, EngineSettings
from optgptq.runtime.llm import LoadedModel
from optgptq.runtime.start import cache_budget


def parse_caches(text: str) -> tuple[str, ...]:
    """Return the settings `kv_cache` of a list with commas.

    Raises:
        UsageError: an unknown one, or one that comes twice.
    """
    choices = tuple(part.strip() for part in text.split(","))
    for index, choice in enumerate(choices):
        if choice not in CACHE_CHOICES or choice in choices[:index]:
            raise UsageError(
                "--kv-cache",
                expected="each once, of " + ", ".join(CACHE_CHOICES),
                found=repr(text),
                action="Write --kv-cache 16,4 for example.",
            )
    return choices


def cache_engines(loaded: LoadedModel, settings: EngineSettings, choices: Sequence[str]) -> list[Engine]:
    """Return an engine for each choice, all on the same weights; the memory of `settings` is shared out evenly.

    With `kv_cache_bytes` each gets so much. A mode in `settings` is that of those that are quantized.

    Raises:
        CapacityError, ModelError, UsageError: as `Engine`.
    """
    decoder = loaded.decoder
    if settings.kv_cache_bytes is None and len(choices) > 1:
        total = cache_budget(decoder, settings, settings.step_tokens(decoder.device.type))
        settings = replace(settings, kv_cache_bytes=max(total // len(choices), 1))
    engines: list[Engine] = []
    for choice in choices:
        # A mode is for those that are quantized: with a plain one beside them nothing is amiss.
        own = replace(settings, kv_cache=choice, past_only=None if choice == PLAIN_CACHE else settings.past_only)
        engines.append(Engine(decoder, loaded.tokenizer, own, loaded.cache))
        # The weights are fused once.
        decoder = engines[0].decoder
    return engines
