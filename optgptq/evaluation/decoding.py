"""A model that reads its keys and values out of an engine's pages, as it does while it writes text.

A full forward never reads the codes of a quantized cache; this does. A window of text goes through the pages in large
steps: modes `off`, `token` and `window:N` do not depend on how a text is cut into steps. Mode `chunk` does, so it is
scored as `token`, which is what it is where tokens are fed one at a time.

Shapes: `B` windows, `S` positions of a window, `M` model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optgptq.evaluation.perplexity import ScoringHead
from optgptq.kv_cache.scheme import EXACT_BITS
from optgptq.kv_cache.setup import CacheSetup
from optgptq.models.decoder import Decoder
from optgptq.runtime.cache_plan import CachePlan, layer_page_bytes, plan_cache, tokens_of_page
from optgptq.runtime.engine_settings import CACHE_OF_CHECKPOINT, EngineSettings
from optgptq.runtime.runner import Runner
from optgptq.runtime.start import start_runner
from optgptq.scheduling.page_tables import PageTables
from optgptq.scheduling.request import Request, Sequence
from optgptq.scheduling.sampling_params import SamplingParams
from optgptq.scheduling.step import StepPart

# The mode of a cache without codes.
PLAIN_CACHE = "plain"
# As many positions keep a processor busy; more only cost memory.
_STEP_TOKENS = 2048
# What one window needs is planned and no more, however much there is.
_NO_LIMIT = 1 << 62
# Bytes of a number that is stored as it was computed, in a model that runs in 16 bits.
_EXACT_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """Which cache a model is scored with; the fields are those of `EngineSettings`."""

    kv_cache: str = CACHE_OF_CHECKPOINT
    past_only: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFacts:
    """The cache that a model was scored with.

    Attributes:
        key_bits, value_bits: of a number with its share of scale and minimum, mean over the layers.
        mode: past-only mode that was scored; `plain` where nothing is quantized.
        num_exact: positions that a token reads exactly at most, its own not counted.
        bytes_per_token: in pages of codes, all layers together, where exact numbers take 2 bytes.
        source: where the scheme comes from.
    """

    key_bits: float
    value_bits: float
    mode: str
    num_exact: int
    bytes_per_token: float
    source: str

    @property
    def bits(self) -> float:
        """Mean of keys and values."""
        return (self.key_bits + self.value_bits) / 2


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DecodingModel:
    """A `LanguageModel` whose attention reads pages; see `start`.

    Attributes:
        runner: the model and its pages; `runner.decoder` is the model without them.
        tables: which pages a window has.
        cache: what the pages hold.
        step_tokens: positions that go through the model together.
    """

    runner: Runner
    tables: PageTables
    cache: CacheFacts
    step_tokens: int = _STEP_TOKENS

    @classmethod
    def start(
        cls, decoder: Decoder, setup: CacheSetup | None, choice: CacheOptions, *, window_size: int
    ) -> DecodingModel:
        """Return the model with pages for one window.

        Args:
            decoder: the model; its linears are fused in place.
            setup: of its folder, None without one.
            choice: the cache to use.
            window_size: tokens of a window, 2 or more.

        Raises:
            UsageError: a choice that does not exist, more tokens than the model's table of positions has.
            ModelError: a cache that does not go with the model.
        """
        settings = EngineSettings(
            kv_cache=choice.kv_cache,
            past_only=choice.past_only,
            max_length=window_size,
            max_running=1,
            max_step_tokens=_STEP_TOKENS,
            kv_cache_bytes=_NO_LIMIT,
            prefix_cache=False,
            graphs=False,
        )
        cache = plan_cache(setup, decoder.spec, settings, number_bytes=_EXACT_BYTES)
        if cache is not None and cache.past.depends_on_steps:
            settings = replace(settings, past_only="token")
            cache = plan_cache(setup, decoder.spec, settings, number_bytes=_EXACT_BYTES)
        page = {"page_size": tokens_of_page(settings, cache), "number_bytes": _EXACT_BYTES}
        num_bytes = sum(layer_page_bytes(decoder.spec, cache, **page)) / page["page_size"]
        runner, limits = start_runner(decoder, settings, setup)
        return cls(runner=runner, tables=PageTables(limits), cache=_facts(cache, num_bytes))

    @property
    def head(self) -> ScoringHead:
        """The model's head."""
        return self.runner.decoder.head

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.runner.decoder.device

    @torch.inference_mode()
    def hidden(self, tokens_BS: torch.Tensor, /) -> torch.Tensor:
        """Return hidden states `[B, S, M]`; each window is a text of its own, and leaves nothing behind."""
        return torch.stack([self._read(row) for row in tokens_BS.tolist()])

    def _read(self, tokens: list[int]) -> torch.Tensor:
        """Return hidden states `[S, M]` of one window."""
        text, states = self._text(tokens), []
        for begin in range(0, len(tokens), self.step_tokens):
            end = min(begin + self.step_tokens, len(tokens))
            copies = self.tables.extend(text, end)
            assert not copies, "a text that shares no page"
            batch = self.runner.tables.batch([StepPart(text, begin, end, ())])
            states.append(self.runner.hidden_of(batch)[0])
            self.tables.advance(text, end)
        self.tables.release(text)
        return torch.cat(states)

    def _text(self, tokens: list[int]) -> Sequence:
        """Return a window as a prompt: rotary frequencies that depend on the length are those of all of it."""
        request = Request(request_id="window", prompt_ids=tuple(tokens), params=SamplingParams(), arrival=0.0)
        groups = self.runner.attend.pool.plan.groups
        return Sequence(request, 0, rank=(0, 0.0, 0, 0), num_groups=len(groups))


def _facts(cache: CachePlan | None, bytes_per_token: float) -> CacheFacts:
    if cache is None:
        return CacheFacts(
            key_bits=EXACT_BITS,
            value_bits=EXACT_BITS,
            mode=PLAIN_CACHE,
            num_exact=0,
            bytes_per_token=bytes_per_token,
            source="nothing is quantized",
        )
    return CacheFacts(
        key_bits=cache.key_bits,
        value_bits=cache.value_bits,
        mode=cache.past.name,
        num_exact=cache.past.sink_tokens + max(cache.past.kept_window - 1, 0),
        bytes_per_token=bytes_per_token,
        source=cache.setup.source,
    )
