"""How triton kernels choose codes, one source for CUDA and HIP. Importing this module imports triton.

The steps, and their order, are those of `optgptq.kv_cache.codec`, in float32 with exactly rounded divisions. Without a
metric and a choice of ranges codes are the same bit for bit, as long as products and sums are not fused.

Shapes: `M` tokens, `D` features of a head, padded. What a group has in common, a scale for example, broadcasts to
`[M, D]`: it is `[M, 1]` where there is one group, `[1, D]` with groups along tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LARGEST = tl.constexpr(65504.0)
_LARGEST_FLOAT32 = tl.constexpr(3.4028234663852886e38)
# A sum with it has no places behind the point: for numbers below 2**22 a rounding, halves to even.
_ROUNDER = tl.constexpr(12582912.0)
_SMALLEST_DETERMINANT = tl.constexpr(1e-6)


@triton.jit
def reduced(x, AXIS: tl.constexpr, KIND: tl.constexpr):
    """Return least, greatest or sum of numbers along an axis."""
    if KIND == "least":
        result = tl.min(x, AXIS)
    elif KIND == "greatest":
        result = tl.max(x, AXIS)
    else:
        result = tl.sum(x, AXIS)
    return result


@triton.jit
def of_groups(x, group, REST: tl.constexpr, KIND: tl.constexpr, GROUPS: tl.constexpr):
    """Return least, greatest or sum of the numbers of each group; `GROUPS` of a token, 0: along tokens.

    `x` is `REST` where there is no number, which changes no result. `group [D]` is that of each feature.
    """
    if GROUPS == 0:
        result = reduced(x, 0, KIND)[None, :]
    elif GROUPS == 1:
        result = reduced(x, 1, KIND)[:, None]
    else:
        result = tl.zeros_like(x)
        for each in tl.static_range(GROUPS):
            is_member = (group == each)[None, :]
            result = tl.where(is_member, reduced(tl.where(is_member, x, REST), 1, KIND)[:, None], result)
    return result


@triton.jit
def rounded_code(code, LIMIT: tl.constexpr):
    """Return the nearest whole number of `0 .. LIMIT`, halves to even; NaN stays."""
    inside = tl.where(code > 0.0, code, tl.where(code <= 0.0, 0.0, code))
    inside = tl.where(inside > LIMIT, 1.0 * LIMIT, inside)
    return (inside + _ROUNDER) - _ROUNDER


@triton.jit
def nearest(x, scale, minimum, LIMIT: tl.constexpr):
    """Return float codes; 0 where the scale is 0 or anything is not finite."""
    code = rounded_code(tl.div_rn(x - minimum, tl.where(scale > 0, scale, 1.0)), LIMIT)
    return tl.where((scale > 0) & (code == code), code, 0.0)


@triton.jit
def as_float16(x):
    """Return numbers rounded to float16, as float32."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def grid_between(low, high, LIMIT: tl.constexpr):
    """Return scale and minimum of a range, values of float16 in float32."""
    return as_float16(tl.div_rn(high - low, tl.full([1, 1], LIMIT, tl.float32))), as_float16(low)


@triton.jit
def choose_range(
    x, is_entry, is_member, group, weight, ranges, num_ranges, LIMIT: tl.constexpr, GROUPS: tl.constexpr,
    SEARCHED: tl.constexpr,
):  # fmt: skip
    """Return scale and minimum of each group: of the candidates `ranges [C, 2]`, the first that loses least.

    `is_member [M, D]` says which entries belong to a group, `is_entry` which of them are of a token that there is.
    """
    is_bad = is_entry & ((x != x) | (tl.abs(x) > _LARGEST_FLOAT32))
    is_finite = of_groups(tl.where(is_bad, 1.0, 0.0), group, 0.0, "sum", GROUPS) == 0.0
    safe = tl.where(is_entry & is_finite, x, 0.0)
    safe = tl.minimum(tl.maximum(safe, -_LARGEST), _LARGEST)
    low = of_groups(tl.where(is_member, safe, float("inf")), group, float("inf"), "least", GROUPS)
    high = of_groups(tl.where(is_member, safe, float("-inf")), group, float("-inf"), "greatest", GROUPS)
    middle = (low + high) * 0.5
    to_low, to_high = low - middle, high - middle
    scale, minimum = grid_between(
        middle + to_low * tl.load(ranges), middle + to_high * tl.load(ranges + 1), LIMIT
    )  # fmt: skip
    if SEARCHED:
        best = lost(safe, scale, minimum, is_entry, weight, group, LIMIT, GROUPS)
        for candidate in range(1, num_ranges):
            begin = middle + to_low * tl.load(ranges + 2 * candidate)
            end = middle + to_high * tl.load(ranges + 2 * candidate + 1)
            new_scale, new_minimum = grid_between(begin, end, LIMIT)
            loss = lost(safe, new_scale, new_minimum, is_entry, weight, group, LIMIT, GROUPS)
            is_better = loss < best
            best = tl.where(is_better, loss, best)
            scale = tl.where(is_better, new_scale, scale)
            minimum = tl.where(is_better, new_minimum, minimum)
    return tl.where(is_finite, scale, 0.0), tl.where(is_finite, minimum, float("nan"))


@triton.jit
def lost(x, scale, minimum, is_entry, weight, group, LIMIT: tl.constexpr, GROUPS: tl.constexpr):
    """Return the squared errors of each group, times `weight [1, D]` where there is one."""
    error = x - (nearest(x, scale, minimum, LIMIT) * scale + minimum)
    error *= error
    if weight is not None:
        error *= weight
    return of_groups(tl.where(is_entry, error, 0.0), group, 0.0, "sum", GROUPS)


@triton.jit
def column(x, channel, wanted, GROUPS: tl.constexpr):
    """Return the numbers `[M]` of one channel; of what is `[M, 1]` the only ones."""
    return tl.sum(x if GROUPS == 1 else tl.where((channel == wanted)[None, :], x, 0.0), 1)


@triton.jit
def matrix_row(matrix, wanted, channel, is_channel, HEAD_DIM: tl.constexpr):
    """Return row `wanted` of a matrix `[head_dim, head_dim]`, as `[1, D]`."""
    return tl.load(matrix + wanted * HEAD_DIM + channel, mask=is_channel, other=0.0)[None, :]


@triton.jit
def round_with_feedback(
    x, scale, minimum, feedback, channel, is_channel, LIMIT: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Return codes, each rounded after the errors of channels before it were taken over."""
    code = tl.zeros_like(x)
    for wanted in range(HEAD_DIM):
        one_scale = column(scale, channel, wanted, GROUPS)
        one_minimum = column(minimum, channel, wanted, GROUPS)
        one = column(x, channel, wanted, 0)
        chosen = nearest(one, one_scale, one_minimum, LIMIT)
        error = one - (chosen * one_scale + one_minimum)
        x += error[:, None] * matrix_row(feedback, wanted, channel, is_channel, HEAD_DIM)
        code = tl.where((channel == wanted)[None, :], chosen[:, None], code)
    return code


@triton.jit
def search(
    x, code, scale, minimum, metric, channel, is_channel, group,
    LIMIT: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Return codes after each channel has once taken the best beside all others, `metric @ error`, and images.

    The images are those of codes and of ones under the blocks of the metric that belong to groups: what a fit needs.
    """
    error = tl.where(is_channel[None, :], x - (code * scale + minimum), 0.0)
    gradient = tl.zeros_like(x)
    for wanted in range(HEAD_DIM):
        row = matrix_row(metric, wanted, channel, is_channel, HEAD_DIM)
        gradient += column(error, channel, wanted, 0)[:, None] * row
    image, ones = tl.zeros_like(x), tl.zeros_like(x)
    for wanted in range(HEAD_DIM):
        row = matrix_row(metric, wanted, channel, is_channel, HEAD_DIM)
        one_scale, before = column(scale, channel, wanted, GROUPS), column(code, channel, wanted, 0)
        divisor = one_scale * tl.load(metric + wanted * (HEAD_DIM + 1))
        step = tl.div_rn(column(gradient, channel, wanted, 0), tl.where(divisor > 0, divisor, float("inf")))
        chosen = rounded_code(before + step, LIMIT)
        chosen = tl.where(chosen == chosen, chosen, before)
        gradient -= ((chosen - before) * one_scale)[:, None] * row
        code = tl.where((channel == wanted)[None, :], chosen[:, None], code)
        block = tl.where((group == wanted // (HEAD_DIM // GROUPS))[None, :], row, 0.0)
        image += chosen[:, None] * block
        ones += block
    return code, gradient, image, ones


@triton.jit
def refit(code, gradient, image, ones, scale, minimum, is_channel, group, GROUPS: tl.constexpr):
    """Return the scale and minimum of each group that lose least, the other groups as they are; rounded to float16."""
    is_entry = is_channel[None, :]
    code, gradient = tl.where(is_entry, code, 0.0), tl.where(is_entry, gradient, 0.0)
    cc = of_groups(code * image, group, 0.0, "sum", GROUPS)
    cm = of_groups(tl.where(is_entry, image, 0.0), group, 0.0, "sum", GROUPS)
    mm = of_groups(tl.where(is_entry, ones, 0.0), group, 0.0, "sum", GROUPS)
    cg = of_groups(code * gradient, group, 0.0, "sum", GROUPS)
    mg = of_groups(gradient, group, 0.0, "sum", GROUPS)
    determinant = cc * mm - cm * cm
    is_sound = determinant > cc * mm * _SMALLEST_DETERMINANT
    divisor = tl.where(is_sound, determinant, 1.0)
    new_scale = as_float16(scale + tl.div_rn(cg * mm - mg * cm, divisor))
    new_minimum = as_float16(minimum + tl.div_rn(mg * cc - cg * cm, divisor))
    is_sound &= (new_scale > 0) & (new_scale <= _LARGEST) & (tl.abs(new_minimum) <= _LARGEST)
    return tl.where(is_sound, new_scale, scale), tl.where(is_sound, new_minimum, minimum)


@triton.jit
def fit(
    x, scale, minimum, metric, feedback, channel, is_channel, group,
    LIMIT: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, REFITS: tl.constexpr,
):  # fmt: skip
    """Return codes, scale and minimum fitted to the metric `[head_dim, head_dim]`."""
    code = round_with_feedback(x, scale, minimum, feedback, channel, is_channel, LIMIT, GROUPS, HEAD_DIM)
    code, gradient, image, ones = search(
        x, code, scale, minimum, metric, channel, is_channel, group, LIMIT, GROUPS, HEAD_DIM
    )
    loss = metric_loss(x, code, scale, minimum, gradient, is_channel)
    for _ in range(REFITS):
        new_scale, new_minimum = refit(code, gradient, image, ones, scale, minimum, is_channel, group, GROUPS)
        new_code, new_gradient, new_image, ones = search(
            x, code, new_scale, new_minimum, metric, channel, is_channel, group, LIMIT, GROUPS, HEAD_DIM
        )
        new_loss = metric_loss(x, new_code, new_scale, new_minimum, new_gradient, is_channel)
        falls = (new_loss < loss)[:, None]
        code, gradient = tl.where(falls, new_code, code), tl.where(falls, new_gradient, gradient)
        image = tl.where(falls, new_image, image)
        scale, minimum = tl.where(falls, new_scale, scale), tl.where(falls, new_minimum, minimum)
        loss = tl.where(new_loss < loss, new_loss, loss)
    return code, scale, minimum


@triton.jit
def metric_loss(x, code, scale, minimum, gradient, is_channel):
    """Return the loss `[M]` of tokens."""
    return tl.sum(tl.where(is_channel[None, :], (x - (code * scale + minimum)) * gradient, 0.0), 1)
