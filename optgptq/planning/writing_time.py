"""Seconds that a model takes to write its own calibration text: tokens come one by one, for many texts at a time.

Shapes: `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

from optgptq.models.inventory import model_linears, outer_linears
from optgptq.models.spec import DecoderSpec
from optgptq.planning.machine import MachineRates

# Texts at a time (`optgptq.runtime.self_text`), and how many of them are still written on average: they end one by one.
TEXTS_AT_A_TIME, _STILL_WRITTEN = 128, 0.7
# What a step takes whatever its size, of which a part for each decoder layer, and what each of its tokens takes.
_STEP_SECONDS, _LAYER_SECONDS, _TOKEN_SECONDS = 1.8e-3, 180e-6, 45e-6
# A logit that is made and drawn from; a device of its own takes no longer.
_LOGIT_SECONDS = 5e-9
# Products with so few rows reach this share of the speed of those with many.
_PRODUCT_SHARE = 0.55
# Numbers that are only read, for each that is read, changed and written.
_READ_NUMBERS = 5
# Texts come to an end: this share of a window is what a token looks back on.
_CONTEXT_SHARE = 0.125


def writing_seconds(spec: DecoderSpec, rates: MachineRates, *, num_windows: int, window_size: int) -> float:
    """Return what it takes to write that many windows."""
    tokens = num_windows * window_size
    rows = _STILL_WRITTEN * min(TEXTS_AT_A_TIME, num_windows)
    shapes = [(linear.out_features, linear.in_features) for linear in model_linears(spec)]
    weights = _product_sum(shapes) + _product_sum(list(outer_linears(spec).values()))
    products = max(rows * weights / (_PRODUCT_SHARE * rates.products), weights / (_READ_NUMBERS * rates.numbers))
    seen = _CONTEXT_SHARE * window_size * 2 * spec.num_kv_heads * spec.head_dim * spec.num_layers
    step = _STEP_SECONDS + spec.num_layers * _LAYER_SECONDS + products
    token = _TOKEN_SECONDS + spec.vocab_size * _LOGIT_SECONDS + seen / (_READ_NUMBERS * rates.numbers)
    return tokens * (step / rows + token)


def _product_sum(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)
