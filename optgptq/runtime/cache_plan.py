"""A quantized cache fitted to a model and to the pages of an engine: checked, laid out, and named."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import lcm

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import UsageError
from optgptq.formats.kv_cache_config import data_free_setup, read_cache_setup
from optgptq.kv_cache.page_layout import PAGE_MULTIPLE, PageLayout, bits_per_value
from optgptq.kv_cache.page_planes import Side, side_scheme
from optgptq.kv_cache.rotary_pairs import RotaryPairs
from optgptq.kv_cache.scheme import (
    USUAL_RECENT_TOKENS,
    USUAL_SINK_TOKENS,
    CacheScheme,
    PastRule,
    granule_of,
    parse_past_mode,
)
from optgptq.kv_cache.setup import CacheSetup
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.cache_checks import require_fit, require_heads_of_codes
from optgptq.runtime.engine_settings import CACHE_OF_CHECKPOINT, DATA_FREE_BITS, USUAL_PAGE_SIZE, EngineSettings
from optgptq.runtime.layer_groups import ExactPages, plain_page_bytes

logger = logging.getLogger(__name__)

# Goes up when bytes of a page mean something else than before.
_LAYOUT_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CachePlan:
    """What each decoder layer stores, and who reads what.

    Attributes:
        setup: scheme and parameters.
        past: the scheme's rule, with the mode that the engine was given and the granule that the groups ask for.
        layouts: of each decoder layer; None for those that keep plain pages.
        number_bytes: bytes of a number as the model computes it.
    """

    setup: CacheSetup
    past: PastRule
    layouts: tuple[PageLayout | None, ...]
    number_bytes: int

    @property
    def key_bits(self) -> float:
        """Bits of a number of keys, its share of scale and minimum included; mean over all layers."""
        return self._mean_bits("keys")

    @property
    def value_bits(self) -> float:
        """The same for values."""
        return self._mean_bits("values")

    def _mean_bits(self, side: Side) -> float:
        bits = []
        for layout in self.layouts:
            if layout is None or side_scheme(layout, side).is_exact:
                bits.append(8.0 * self.number_bytes)
            else:
                bits.append(bits_per_value(side_scheme(layout, side), layout.head_dim))
        return sum(bits) / len(bits)

    @property
    def quantized_layers(self) -> tuple[int, ...]:
        """Indices of the layers that store codes."""
        return tuple(index for index, layout in enumerate(self.layouts) if layout is not None)

    @property
    def page_size(self) -> int:
        """Tokens of a page, the same in all layers."""
        return next(layout.page_size for layout in self.layouts if layout is not None)

    @property
    def keeps_exact_pages(self) -> bool:
        """Keys and values of some tokens are kept in full precision after the step that computed them."""
        return self.past.sink_tokens > 0 or self.past.kept_window > 0

    @property
    def digest(self) -> bytes:
        """SHA-256 of all that decides what a page of a text holds, besides its tokens."""
        facts = {
            "layout": _LAYOUT_VERSION,
            "past": asdict(self.past),
            "layers": [None if layout is None else asdict(layout) for layout in self.layouts],
        }
        return sha256(self.setup.fingerprint + json.dumps(facts, sort_keys=True).encode()).digest()

    def sentence(self) -> str:
        """Return the cache for a log."""
        num_exact = self.layouts.count(None)
        past = f"past-only {self.past.name}"
        past += f", {self.past.sink_tokens} first tokens exact" if self.past.sink_tokens else ""
        past += f", {self.past.recent_tokens} last ones" if self.past.recent_tokens else ""
        past += f"; {num_exact} layers stay exact" if num_exact else ""
        bits = f"{self.key_bits:.2f} bits per number of keys, {self.value_bits:.2f} of values"
        return f"{bits}, {past}; {self.setup.source}"


def plan_cache(
    setup: CacheSetup | None, spec: DecoderSpec, settings: EngineSettings, *, number_bytes: int
) -> CachePlan | None:
    """Return the cache of an engine; None for a plain one.

    Args:
        setup: of the model's folder.
        spec: the model.
        settings: say whether to use it.
        number_bytes: bytes of a number as the model computes it.

    Raises:
        UsageError: settings that the cache does not go with.
        ModelError: a model that the cache does not go with.
    """
    chosen = _chosen_setup(setup, spec, settings)
    if chosen is None:
        if settings.past_only is not None:
            logger.warning("past_only does nothing: keys and values are stored as they are computed")
        return None
    require_fit(chosen, spec)
    past = _past_rule(chosen.scheme, settings)
    page_size = _page_size(past, settings)
    layouts = tuple(
        None
        if scheme.is_exact
        else PageLayout(
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            page_size=page_size,
            scheme=scheme,
            exact_bytes=number_bytes,
        )
        for scheme in chosen.scheme.layers
    )
    return CachePlan(setup=chosen, past=past, layouts=layouts, number_bytes=number_bytes)


def cache_of_folder(folder: CheckpointFolder, spec: DecoderSpec) -> CacheSetup | None:
    """Return the quantized cache that a model's folder asks for, None where it asks for none.

    Raises:
        FormatError: its scheme or its file of parameters cannot be used.
    """
    pairs = [None if layer.rope is None else RotaryPairs(rotary_dim=layer.rope.rotary_dim) for layer in spec.layers]
    return read_cache_setup(
        folder, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, pairs=pairs
    )


def tokens_of_page(settings: EngineSettings, cache: CachePlan | None) -> int:
    """Return the tokens of a page of an engine with this cache."""
    return cache.page_size if cache is not None else settings.page_size or USUAL_PAGE_SIZE


def layer_page_bytes(
    spec: DecoderSpec, cache: CachePlan | None, *, page_size: int, number_bytes: int
) -> tuple[int, ...]:
    """Return the bytes of a page of each decoder layer, without what is kept exactly besides."""
    plain = plain_page_bytes(spec, page_size=page_size, number_bytes=number_bytes)
    if cache is None:
        return plain
    return tuple(plain[index] if layout is None else layout.page_bytes for index, layout in enumerate(cache.layouts))


def exact_pages(spec: DecoderSpec, cache: CachePlan | None, *, page_size: int, number_bytes: int) -> ExactPages | None:
    """Return what quantized layers keep besides their codes; None for nothing."""
    if cache is None or not cache.keeps_exact_pages:
        return None
    plain = plain_page_bytes(spec, page_size=page_size, number_bytes=number_bytes)
    layers = cache.quantized_layers
    return ExactPages(
        num_sinks=cache.past.sink_tokens,
        window=cache.past.kept_window,
        layers=layers,
        page_bytes=sum(plain[index] for index in layers),
        # Where texts depend on steps anyway, keys of an earlier step may as well be read from codes.
        forgets_window=cache.past.depends_on_steps,
    )


def _chosen_setup(setup: CacheSetup | None, spec: DecoderSpec, settings: EngineSettings) -> CacheSetup | None:
    if settings.kv_cache == CACHE_OF_CHECKPOINT:
        return None if setup is None or setup.scheme.is_exact else setup
    bits = DATA_FREE_BITS.get(settings.kv_cache)
    if bits is None:
        return None
    require_heads_of_codes(spec)
    past = PastRule(sink_tokens=USUAL_SINK_TOKENS[bits], recent_tokens=USUAL_RECENT_TOKENS[bits])
    return data_free_setup(
        bits, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, past=past
    )


def _past_rule(scheme: CacheScheme, settings: EngineSettings) -> PastRule:
    past = replace(scheme.past, granule=granule_of(scheme.layers))
    if settings.past_only is not None:
        mode, window = parse_past_mode(settings.past_only)
        past = replace(past, mode=mode, window=window)
    if settings.deterministic and past.depends_on_steps:
        raise UsageError(
            "deterministic",
            expected="a cache whose texts do not depend on how they are cut into steps",
            found=f"past-only mode {past.name}, in which a prompt's own step is exact",
            action="Set past_only to token or window:N.",
        )
    return past


def _page_size(past: PastRule, settings: EngineSettings) -> int:
    """Return the tokens of a page: whole groups along tokens."""
    multiple = lcm(PAGE_MULTIPLE, past.granule)
    page_size = settings.page_size or lcm(USUAL_PAGE_SIZE, multiple)
    if page_size % multiple:
        raise UsageError(
            "page_size",
            expected=f"a multiple of {multiple} with this quantized cache",
            found=str(page_size),
            action="Leave this setting of the engine out, change it, or set kv_cache to 16.",
        )
    return page_size
