"""What a checkpoint says of its KV cache: bits per value, bytes per token, what is exact, how its codes are made."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.paths import require_inside
from optgptq.formats.kv_cache_config import read_cache_keys
from optgptq.formats.kv_cache_keys import LayerKeys
from optgptq.formats.kv_cache_sidecar import read_header
from optgptq.kv_cache.page_layout import PAGE_MULTIPLE, PageLayout, bits_per_value
from optgptq.kv_cache.scheme import EXACT_BITS, SideScheme
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec

_EXACT_BYTES = EXACT_BITS // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSideReport:
    """Keys, or values, of one decoder layer.

    Attributes:
        bits: of a code; 16: not quantized.
        group_size: numbers that share a scale and a minimum; 0 where nothing is quantized.
        axis: along which a group runs, `channel` or `token`.
        bits_per_value: with the share of scale and minimum, and of what fills up rows of codes.
        transform: what is done before rounding.
        fitted: codes are fitted to what an error costs; else each number is rounded to the nearest.
    """

    bits: int
    group_size: int
    axis: str
    bits_per_value: float
    transform: str
    fitted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayerReport:
    """One decoder layer; `bytes_per_token` counts keys and values of all heads, parameters and padding."""

    index: int
    keys: CacheSideReport
    values: CacheSideReport
    bytes_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """The whole cache.

    Attributes:
        key_bits_per_value, value_bits_per_value: means over the decoder layers.
        bytes_per_token: of all decoder layers, exact tokens left aside.
        exact_bytes_per_token: what a cache of 16 bits takes.
        past_only: which keys a query reads exactly: off, token, chunk or window:N.
        sink_tokens, recent_tokens: first and last tokens that are kept exactly besides.
        folded: what was moved into the weights.
        calibration: where the parameters come from.
        layers: one record per decoder layer.
    """

    key_bits_per_value: float
    value_bits_per_value: float
    bytes_per_token: float
    exact_bytes_per_token: float
    past_only: str
    sink_tokens: int
    recent_tokens: int
    folded: Mapping[str, Any]
    calibration: Mapping[str, Any]
    layers: tuple[CacheLayerReport, ...]

    @property
    def layers_differ(self) -> bool:
        """Some layer is stored otherwise than the first."""
        return len({(layer.keys, layer.values) for layer in self.layers}) > 1


def cache_report(folder: CheckpointFolder) -> CacheReport | None:
    """Return the report of the cache that a checkpoint asks for, None where it asks for none; headers are read only.

    Raises:
        ModelError: its model is not known, or the file of parameters is missing.
        FormatError: its key cannot be understood, or the file of parameters is no safetensors file.
    """
    spec = model_spec(folder)
    keys = read_cache_keys(folder, num_layers=spec.num_layers, head_dim=spec.head_dim)
    if keys is None:
        return None
    stored = {info.name for info in read_header(require_inside(folder.path, keys.params_file))}
    page_size = math.lcm(PAGE_MULTIPLE, keys.past.granule)
    layers = tuple(_layer(index, said, spec, stored, page_size) for index, said in enumerate(keys.layers))
    return CacheReport(
        key_bits_per_value=sum(layer.keys.bits_per_value for layer in layers) / len(layers),
        value_bits_per_value=sum(layer.values.bits_per_value for layer in layers) / len(layers),
        bytes_per_token=sum(layer.bytes_per_token for layer in layers),
        exact_bytes_per_token=2.0 * _EXACT_BYTES * spec.num_layers * spec.num_kv_heads * spec.head_dim,
        past_only=keys.past.name,
        sink_tokens=keys.past.sink_tokens,
        recent_tokens=keys.past.recent_tokens,
        folded=dict(keys.folded),
        calibration=dict(keys.calibration),
        layers=layers,
    )


def _layer(index: int, said: LayerKeys, spec: DecoderSpec, stored: Collection[str], page_size: int) -> CacheLayerReport:
    layout = PageLayout(
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        page_size=page_size,
        scheme=said.scheme,
        exact_bytes=_EXACT_BYTES,
    )
    key_transform, value_transform = said.transforms
    return CacheLayerReport(
        index=index,
        keys=_side(said.scheme.keys, spec, key_transform, fitted=f"layers.{index}.k_metric" in stored),
        values=_side(said.scheme.values, spec, value_transform, fitted=f"layers.{index}.v_metric" in stored),
        bytes_per_token=layout.bytes_per_token,
    )


def _side(side: SideScheme, spec: DecoderSpec, transform: str, *, fitted: bool) -> CacheSideReport:
    return CacheSideReport(
        bits=side.bits,
        group_size=side.group_size,
        axis=side.axis,
        bits_per_value=bits_per_value(side, spec.head_dim),
        transform="none" if side.is_exact else transform,
        # Groups along tokens take no metric.
        fitted=fitted and not side.is_exact and side.axis == "channel",
    )
