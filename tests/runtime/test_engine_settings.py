"""Settings of an engine: what they are on each device, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from optgptq.errors import UsageError
from optgptq.runtime.engine_settings import (
    CPU_RUNNING,
    CPU_STEP_TOKENS,
    GPU_RUNNING,
    GPU_STEP_TOKENS,
    EngineSettings,
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"page_size": 12}, "page_size: expected a multiple of 8, found 12."),
        ({"page_size": 0}, "page_size: expected a multiple of 8, found 0."),
        ({"max_length": 1}, "max_length: expected at least 2: a token to read and one to write, found 1."),
        ({"max_length": 0}, "max_length: expected at least 1, found 0."),
        ({"max_step_tokens": 0}, "max_step_tokens: expected at least 1, found 0."),
        ({"max_running": 0}, "max_running: expected at least 1, found 0."),
        ({"max_waiting": 0}, "max_waiting: expected at least 1, found 0."),
        ({"kv_cache_bytes": -1}, "kv_cache_bytes: expected at least 1, found -1."),
        ({"max_running": 9, "max_step_tokens": 8}, "max_running: expected at most max_step_tokens (8): each text"),
        ({"memory_share": 0.0}, "memory_share: expected more than 0 and at most 1, found 0.0."),
        ({"memory_share": float("nan")}, "memory_share: expected more than 0 and at most 1, found nan."),
        ({"watermark_ratio": 1.0}, "watermark_ratio: expected 0 or more and below 1, found 1.0."),
        ({"aging_steps": 0}, "aging_steps: expected at least 1, found 0."),
        ({"seed": -1}, "seed: expected an integer from 0 to 2**62 - 1, found -1."),
        ({"seed": 1 << 62}, "seed: expected an integer from 0 to 2**62 - 1"),
        ({"page_size": "16"}, "page_size: expected a whole number or None, found '16'."),
        ({"page_size": 16.0}, "page_size: expected a whole number or None, found 16.0."),
        ({"page_size": True}, "page_size: expected a whole number or None, found True."),
        ({"kv_cache_bytes": 1.5e6}, "kv_cache_bytes: expected a whole number or None, found 1500000.0."),
        ({"max_length": float("nan")}, "max_length: expected a whole number or None, found nan."),
        ({"max_waiting": False}, "max_waiting: expected a whole number or None, found False."),
        ({"seed": None}, "seed: expected a whole number, found None."),
        ({"aging_steps": 2.5}, "aging_steps: expected a whole number, found 2.5."),
        ({"memory_share": "all"}, "memory_share: expected a number or None, found 'all'."),
        ({"watermark_ratio": None}, "watermark_ratio: expected a number, found None."),
        ({"prefix_cache": 1}, "prefix_cache: expected True or False, found 1."),
        ({"deterministic": "no"}, "deterministic: expected True or False, found 'no'."),
        ({"graphs": None}, "graphs: expected True or False, found None."),
        ({"kv_cache": "5"}, "kv_cache: expected one of checkpoint, 16, 8, 4, 3, 2, found '5'."),
        ({"kv_cache": 4}, "kv_cache: expected text, found 4."),
        ({"past_only": 4}, "past_only: expected text or None, found 4."),
        ({"kv_cache": "4", "page_size": 24}, "page_size: expected a multiple of 16 with a quantized cache, found 24."),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        EngineSettings(**values)
    assert message in str(caught.value)
    assert str(caught.value).endswith("Change this setting of the engine, or leave it out.")


@pytest.mark.parametrize(
    ("values", "cpu", "cuda"),
    [
        ({}, (CPU_STEP_TOKENS, CPU_RUNNING), (GPU_STEP_TOKENS, GPU_RUNNING)),
        ({"max_step_tokens": 11}, (11, 11), (11, 11)),
        ({"max_step_tokens": 100}, (100, CPU_RUNNING), (100, 100)),
        ({"max_running": 300}, (300, 300), (GPU_STEP_TOKENS, 300)),
        ({"max_running": 3, "max_step_tokens": 3}, (3, 3), (3, 3)),
    ],
)
def test_tokens_and_texts_of_a_step(values: dict[str, int], cpu: tuple[int, int], cuda: tuple[int, int]) -> None:
    settings = EngineSettings(**values)
    for device, expected in (("cpu", cpu), ("cuda", cuda)):
        assert (settings.step_tokens(device), settings.running(device)) == expected


@pytest.mark.parametrize("mode", ["window", "window:0", "window:x", "recent", "chunk:4", ""])
def test_modes_that_there_are_not(mode: str) -> None:
    with pytest.raises(UsageError, match="window:N") as caught:
        EngineSettings(past_only=mode)
    assert (caught.value.where, caught.value.found) == ("past_only", repr(mode))


def test_shares_of_memory() -> None:
    assert (EngineSettings().memory_share_of("cpu"), EngineSettings().memory_share_of("cuda")) == (0.5, 0.9)
    assert EngineSettings(memory_share=0.2).memory_share_of("cuda") == 0.2
