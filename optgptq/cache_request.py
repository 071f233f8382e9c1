"""What a recipe asks of the KV cache of a model: bits, groups and exact keys of each decoder layer, decided before
anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from optgptq.errors import ModelError, RecipeError
from optgptq.kv_cache.page_layout import require_head_size, row_bytes
from optgptq.kv_cache.scheme import (
    CODE_BITS,
    USUAL_RECENT_TOKENS,
    USUAL_SINK_TOKENS,
    CacheScheme,
    LayerScheme,
    PastRule,
    SideScheme,
    parse_past_mode,
)
from optgptq.models.spec import DecoderSpec
from optgptq.recipe.kv_cache import KVCacheRecipe, layer_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRequest:
    """What is made of the cache.

    Attributes:
        scheme: bits and groups by decoder layer; with a budget the bits are a start.
        fixed_layers: layers that the recipe names; a budget leaves their bits alone.
        allowed_bits: what a budget may give a side: 2 bits only beside the exact tokens that these need.
        notes: what is not done as asked, and why.
    """

    scheme: CacheScheme
    fixed_layers: frozenset[int]
    allowed_bits: tuple[int, ...]
    notes: tuple[str, ...]


def request_cache(spec: DecoderSpec, recipe: KVCacheRecipe, *, weights_stay: bool = False) -> CacheRequest | None:
    """Return the plan, None where nothing of the cache is quantized.

    `weights_stay`: the job has no other task, so that advice to leave the cache alone names one.

    Raises:
        RecipeError: layers that the model does not have, groups that do not divide its heads, or nothing left to
            quantize.
        ModelError: its heads do not split into codes.
    """
    if not recipe.is_quantized:
        return None
    leaving_it = _leaving_it(weights_stay=weights_stay)
    require_head_size(spec.head_dim, error=ModelError, where="kv_cache.bits", action=f"{leaving_it} for this model.")
    if recipe.group_size != -1 and spec.head_dim % recipe.group_size:
        raise RecipeError(
            "kv_cache.group_size",
            expected=f"a divisor of the {spec.head_dim} channels of a head, or -1 for all of them",
            found=f"{recipe.group_size}",
            action="Set kv_cache.group_size=-1.",
        )
    layers, fixed = _layers(spec, recipe)
    if all(layer.is_exact for layer in layers):
        raise RecipeError(
            "kv_cache.skip_layers and kv_cache.layers",
            expected="at least one decoder layer to quantize",
            found=f"16 bits for all {spec.num_layers}",
            action=f"Name fewer layers. {leaving_it} where no layer is to have codes.",
        )
    return CacheRequest(
        scheme=CacheScheme(layers=layers, past=_past(recipe, layers)),
        fixed_layers=fixed,
        allowed_bits=_allowed_bits(recipe, layers),
        notes=(*_notes(spec, recipe), *_padding_notes(spec, layers)),
    )


def check_num_windows(of_text: int, of_cache: int) -> None:
    """Raise RecipeError where the windows that a cache is calibrated on are fewer than two.

    Args:
        of_text: calibration.num_windows.
        of_cache: kv_cache.num_windows.
    """
    if min(of_text, of_cache) >= 2:
        return
    field = "kv_cache.num_windows" if of_cache < of_text else "calibration.num_windows"
    raise RecipeError(
        field,
        expected="at least 2 windows where a KV cache is calibrated: one to measure on, one to choose with",
        found=str(min(of_text, of_cache)),
        action=f"Set {field} to 2 or more, or set kv_cache.calibrated=false.",
    )


def check_windows(plan: CacheRequest, window_size: int) -> None:
    """Raise RecipeError where no query of a calibration window reads anything from codes."""
    past, last = plan.scheme.past, window_size - 1
    # As decoding reads: a token is a step of its own.
    first_exact = past.first_exact(last, last)
    if first_exact > past.sink_tokens:
        return
    raise RecipeError(
        "calibration.window_size",
        expected="windows that are longer than the keys that are read in 16 bits, where a KV cache is calibrated",
        found=f"{window_size} tokens, with the first {past.sink_tokens} and the last {window_size - first_exact} exact",
        action="Use longer windows or fewer exact tokens, or set kv_cache.calibrated=false.",
    )


def most_parameter_bytes(spec: DecoderSpec) -> int:
    """Return what a file of parameters takes at most: float32, a metric and a rotation for both sides of each head."""
    of_side = spec.num_kv_heads * (2 * spec.head_dim**2 + 2 * spec.head_dim)
    return 2 * spec.num_layers * of_side * 4


def _layers(spec: DecoderSpec, recipe: KVCacheRecipe) -> tuple[tuple[LayerScheme, ...], frozenset[int]]:
    bits = [[recipe.key_bits or recipe.bits, recipe.value_bits or recipe.bits] for _ in spec.layers]
    fixed: set[int] = set()
    for number, rule in enumerate(recipe.layers):
        for index in _numbers(rule.layers, spec, where=f"kv_cache.layers.{number}.layers"):
            bits[index] = [rule.key_bits or bits[index][0], rule.value_bits or bits[index][1]]
            fixed.add(index)
    if recipe.skip_layers is not None:
        for index in _numbers(recipe.skip_layers, spec, where="kv_cache.skip_layers"):
            bits[index] = [16, 16]
            fixed.add(index)
    size = spec.head_dim if recipe.group_size == -1 else recipe.group_size

    def keys(width: int) -> SideScheme:
        if recipe.key_axis == "channel" or width == 16:
            return _along_channels(width, size)
        return SideScheme(bits=width, group_size=recipe.key_group_tokens, axis="token")

    layers = (LayerScheme(keys=keys(key), values=_along_channels(value, size)) for key, value in bits)
    return tuple(layers), frozenset(fixed)


def _along_channels(bits: int, group_size: int) -> SideScheme:
    return SideScheme() if bits == 16 else SideScheme(bits=bits, group_size=group_size)


def _numbers(text: str, spec: DecoderSpec, *, where: str) -> list[int]:
    ranges = layer_ranges(text)
    largest = max(last for _, last in ranges)
    if largest >= spec.num_layers:
        raise RecipeError(
            where,
            expected=f"decoder layers of this model, 0 to {spec.num_layers - 1}",
            found=f"{largest}",
            action="Name layers that there are.",
        )
    return [index for first, last in ranges for index in range(first, last + 1)]


def _past(recipe: KVCacheRecipe, layers: tuple[LayerScheme, ...]) -> PastRule:
    mode, window = parse_past_mode(recipe.past_only)
    by_token = any(layer.keys.axis == "token" for layer in layers)
    fewest = _fewest_bits(recipe, layers)
    return PastRule(
        mode=mode,
        window=window,
        sink_tokens=USUAL_SINK_TOKENS[fewest] if recipe.sink_tokens is None else recipe.sink_tokens,
        recent_tokens=USUAL_RECENT_TOKENS[fewest] if recipe.recent_tokens is None else recipe.recent_tokens,
        granule=recipe.key_group_tokens if by_token else 1,
    )


def _fewest_bits(recipe: KVCacheRecipe, layers: tuple[LayerScheme, ...]) -> int:
    fewest = min(side.bits for layer in layers for side in (layer.keys, layer.values))
    if recipe.budget_bits is None:
        return fewest
    # A budget may give any side fewer bits than the mean.
    return min(fewest, 2 if recipe.budget_bits < 3 else 3)


def _allowed_bits(recipe: KVCacheRecipe, layers: tuple[LayerScheme, ...]) -> tuple[int, ...]:
    """Return what a budget may choose from; codes of 2 bits are not usable beside the exact tokens of 3."""
    names_tokens = recipe.sink_tokens is not None and recipe.recent_tokens is not None
    if names_tokens or _fewest_bits(recipe, layers) == CODE_BITS[0]:
        return CODE_BITS
    return CODE_BITS[1:]


def _leaving_it(*, weights_stay: bool) -> str:
    if weights_stay:
        return "Set kv_cache.bits=16 and give the job another task (a weights.method, gqa.group or a transform)"
    return "Set kv_cache.bits=16"


def _padding_notes(spec: DecoderSpec, layers: tuple[LayerScheme, ...]) -> tuple[str, ...]:
    """Return a sentence for each number of bits whose rows are filled up to those of more bits."""
    asked = {side.bits for layer in layers for side in (layer.keys, layer.values) if not side.is_exact}
    notes = []
    for bits in sorted(asked):
        taken = _code_row_bytes(bits, spec)
        wider = [more for more in CODE_BITS if more > bits and _code_row_bytes(more, spec) <= taken]
        if wider:
            notes.append(
                f"kv_cache: at heads of {spec.head_dim} channels, codes of {bits} bits take no fewer bytes than those "
                f"of {wider[-1]}, since rows are filled up: take {wider[-1]}"
            )
    return tuple(notes)


def _code_row_bytes(bits: int, spec: DecoderSpec) -> int:
    return row_bytes(_along_channels(bits, spec.head_dim), spec.head_dim, exact_bytes=2)


def _notes(spec: DecoderSpec, recipe: KVCacheRecipe) -> tuple[str, ...]:
    if recipe.key_transform != "shift_scale" or spec.attention_softcap is None:
        return ()
    return (
        "kv_cache.key_transform: keys are scaled and not shifted, since this model caps its attention scores, and a "
        "shift of keys then does not drop out of the softmax",
    )
