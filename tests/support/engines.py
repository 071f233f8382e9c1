"""Engines on tiny models with a tokenizer of bytes, and requests whose text is known in advance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.quantizable import tiny_model, write_model

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.tokenizer import load_tokenizer
from optgptq.models.decoder import load_decoder
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.results import GenerationResult, Piece
from optgptq.scheduling.sampling_params import SamplingParams

END_OF_TEXT = 1


def write_byte_model(folder: Path) -> Path:
    """Write a tiny Llama with a tokenizer of bytes, which ends texts with `END_OF_TEXT`."""
    return write_model(tiny_model("llama-grouped_query", bos_token_id=0, eos_token_id=END_OF_TEXT), folder)


def byte_engine(folder: Path, *, with_tokenizer: bool = True, clock: Any = None, **settings: Any) -> Engine:
    """Return an engine on the model in a folder, with small pages."""
    wanted = {"page_size": 8, "max_running": 4, "max_length": 64, **settings}
    clocks = {} if clock is None else {"clock": clock}
    tokenizer = load_tokenizer(folder) if with_tokenizer else None
    return Engine(load_decoder(CheckpointFolder.open(folder)), tokenizer, EngineSettings(**wanted), **clocks)


@dataclass(frozen=True)
class Forced:
    """A logits processor that leaves one token for each place; the last one is repeated."""

    token_ids: Sequence[int]

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        token = self.token_ids[min(len(output_ids), len(self.token_ids) - 1)]
        return torch.zeros_like(logits_V).index_fill_(0, torch.tensor([token]), 100.0)


@dataclass
class Watching:
    """A logits processor that calls a function once, before the token with a given number."""

    number: int
    call: Any
    seen: list[int] = field(default_factory=list)

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        if len(output_ids) == self.number:
            self.call()
        self.seen.append(len(output_ids))
        return logits_V


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def saying(engine: Engine, text: str, *, then: Sequence[int] = (END_OF_TEXT,), **params: Any) -> SamplingParams:
    """Return parameters under which the engine writes this text, then these tokens."""
    assert engine.tokenizer is not None
    forced = Forced([*engine.tokenizer.encode(text), *then])
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 40, "logits_processors": [forced], **params})


def run_out(engine: Engine) -> tuple[dict[str, GenerationResult], list[Piece]]:
    """Run steps until nothing is left; return results by id, and all pieces."""
    results, pieces = {}, []
    while engine.has_work:
        pieces += engine.step()
        results.update(engine.take_results())
    results.update(engine.take_results())
    return results, pieces


def nothing_is_held(engine: Engine) -> bool:
    """Whether all pages are free and nothing is remembered of any request."""
    usage = engine.usage()
    left = (usage.num_running, usage.num_waiting, usage.allocated_slots, engine.has_work, engine.scheduler.has_work)
    return not any(left)
