// Codes of one vector fitted to a metric: rounding with error feedback, a search through the channels, and scales and
// minimums by least squares. The definition is `optgptq/kv_cache/codec.py`. Included once by each instruction set.
#pragma once

#include "cache_encode.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

constexpr int kRefits = 2;
constexpr float kSmallestDeterminant = 1e-6f;

// A metric `[D, D]` of one head and what is made of it.
struct Metric {
  const float* rows;
  const float* feedback;
  const float* diagonal;    // [D]
  const float* block_sums;  // [groups]
  const float* ones;        // [D]
  std::int64_t head_dim, group_size;
  float limit;
};

// Work space for one vector, each of `padded_size(D)` numbers.
struct Fit {
  float* code;
  float* gradient;
  Range* ranges;
  float* error;  // also what is left of a vector while it is rounded
};

inline std::int64_t padded_size(std::int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// to += factor * row for entries `begin .. end - 1`.
OPTGPTQ_INLINE void add_row(float* to, const float* row, float factor, std::int64_t begin, std::int64_t end) {
  std::int64_t index = begin;
  for (; index + kLanes <= end; index += kLanes) {
    const FloatVector sum = multiply_add(load_numbers(row + index), every(factor), load_numbers(to + index));
    __builtin_memcpy(to + index, &sum, sizeof sum);
  }
  for (; index < end; ++index) to[index] += factor * row[index];
}

// Columns from `column` on in blocks of `F` vectors, then in ever smaller ones; returns the first that is left.
template <int F>
OPTGPTQ_INLINE std::int64_t sum_columns(
    float* to, const float* rows, std::int64_t stride, const float* factors, std::int64_t count, std::int64_t size,
    std::int64_t column) {
  for (; column + F * kLanes <= size; column += F * kLanes) {
    FloatVector sum[F] = {};
    for (std::int64_t index = 0; index < count; ++index) {
      const float* row = rows + index * stride + column;
      const FloatVector factor = every(factors[index]);
      for (int f = 0; f < F; ++f) sum[f] = multiply_add(load_numbers(row + f * kLanes), factor, sum[f]);
    }
    for (int f = 0; f < F; ++f) __builtin_memcpy(to + column + f * kLanes, &sum[f], sizeof(FloatVector));
  }
  if constexpr (F > 1) return sum_columns<F / 2>(to, rows, stride, factors, count, size, column);
  return column;
}

// The sum of `count` rows by their factors; `size` numbers of each.
inline void sum_rows(
    float* to, const float* rows, std::int64_t stride, const float* factors, std::int64_t count, std::int64_t size) {
  const std::int64_t first = sum_columns<4>(to, rows, stride, factors, count, size, 0);
  for (std::int64_t column = first; column < size; ++column) to[column] = 0.0f;
  for (std::int64_t index = 0; index < count; ++index) {
    for (std::int64_t column = first; column < size; ++column) {
      to[column] += factors[index] * rows[index * stride + column];
    }
  }
}

OPTGPTQ_INLINE float nearest_code(float x, Range range, float limit) {
  if (!(range.scale > 0.0f)) return 0.0f;
  const float place = (x - range.minimum) / range.scale;
  if (!(place == place)) return 0.0f;
  return __builtin_rintf(place < 0.0f ? 0.0f : place > limit ? limit : place);
}

inline void round_with_feedback(const Metric& metric, const float* x, Fit& fit) {
  float* moved = fit.error;
  for (std::int64_t channel = 0; channel < metric.head_dim; ++channel) moved[channel] = x[channel];
  for (std::int64_t channel = 0; channel < metric.head_dim; ++channel) {
    const Range range = fit.ranges[channel / metric.group_size];
    const float code = nearest_code(moved[channel], range, metric.limit);
    const float error = moved[channel] - (code * range.scale + range.minimum);
    fit.code[channel] = code;
    add_row(
        moved, metric.feedback + channel * metric.head_dim, error, channel / kLanes * kLanes, metric.head_dim);
  }
}

inline void set_error(const Metric& metric, const float* x, Fit& fit) {
  for (std::int64_t first = 0; first < metric.head_dim; first += metric.group_size) {
    const Range range = fit.ranges[first / metric.group_size];
    for (std::int64_t channel = first; channel < first + metric.group_size; ++channel) {
      fit.error[channel] = x[channel] - (fit.code[channel] * range.scale + range.minimum);
    }
  }
}

inline float dot(const float* a, const float* b, std::int64_t count) {
  FloatVector sum{};
  std::int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    sum = multiply_add(load_numbers(a + index), load_numbers(b + index), sum);
  }
  float total = sum_of_lanes(sum);
  for (; index < count; ++index) total += a[index] * b[index];
  return total;
}

// Each channel takes once the code that is best beside all others; `gradient` is then metric @ error. Returns the loss.
inline float search_codes(const Metric& metric, const float* x, Fit& fit) {
  const std::int64_t head_dim = metric.head_dim;
  set_error(metric, x, fit);
  sum_rows(fit.gradient, metric.rows, head_dim, fit.error, head_dim, head_dim);
  for (std::int64_t channel = 0; channel < head_dim; ++channel) {
    const float scale = fit.ranges[channel / metric.group_size].scale, curve = scale * metric.diagonal[channel];
    if (!(curve > 0.0f)) continue;
    const float place = fit.code[channel] + fit.gradient[channel] / curve;
    if (!(place == place)) continue;
    const float code = __builtin_rintf(place < 0.0f ? 0.0f : place > metric.limit ? metric.limit : place);
    if (code == fit.code[channel]) continue;
    const float change = (code - fit.code[channel]) * scale;
    fit.code[channel] = code;
    add_row(fit.gradient, metric.rows + channel * head_dim, -change, 0, head_dim);
  }
  set_error(metric, x, fit);
  return dot(fit.error, fit.gradient, head_dim);
}

// The scale and minimum of a group that lose least, the codes and the other groups as they are.
inline Range refitted(const Metric& metric, const Fit& fit, std::int64_t group, float* image) {
  const std::int64_t size = metric.group_size, first = group * size;
  const float* code = fit.code + first;
  const float* gradient = fit.gradient + first;
  sum_rows(image, metric.rows + first * metric.head_dim + first, metric.head_dim, code, size, size);
  const float cc = dot(code, image, size), cm = dot(metric.ones, image, size);
  const float cg = dot(code, gradient, size), mg = dot(metric.ones, gradient, size);
  const float mm = metric.block_sums[group], determinant = cc * mm - cm * cm;
  const Range old = fit.ranges[group];
  if (!(determinant > kSmallestDeterminant * cc * mm)) return old;
  const Range range = {
      rounded_to_half(old.scale + (cg * mm - mg * cm) / determinant),
      rounded_to_half(old.minimum + (mg * cc - cg * cm) / determinant)};
  const bool finite = range.scale * 0.0f == 0.0f && range.minimum * 0.0f == 0.0f;
  return range.scale > 0.0f && finite ? range : old;
}

// Fit `best`, whose ranges are set; `trial` and `image` are work space. The result is in `best`.
inline void fit_codes(const Metric& metric, const float* x, Fit& best, Fit& trial, float* image) {
  const std::int64_t num_groups = metric.head_dim / metric.group_size;
  round_with_feedback(metric, x, best);
  float loss = search_codes(metric, x, best);
  for (int round = 0; round < kRefits; ++round) {
    for (std::int64_t group = 0; group < num_groups; ++group) {
      trial.ranges[group] = refitted(metric, best, group, image);
    }
    for (std::int64_t channel = 0; channel < metric.head_dim; ++channel) trial.code[channel] = best.code[channel];
    const float found = search_codes(metric, x, trial);
    // A second refit from the same codes would find the same.
    if (!(found < loss)) return;
    loss = found;
    const Fit better = trial;
    trial = best;
    best = better;
  }
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
