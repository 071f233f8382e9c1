// From vectors to codes: what `optgptq/kv_cache/codec.py` defines, operation for operation, where nothing is fitted.
// Included once by each instruction set.
#pragma once

#include "cache_codes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

constexpr float kLargestHalf = 65504.0f;

// A product that no sum may be contracted with: codes must not depend on the compiler's choice.
OPTGPTQ_INLINE float apart(float product) {
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

OPTGPTQ_INLINE FloatVector apart(FloatVector product) {
#if OPTGPTQ_VECTOR_BYTES == 64
  __asm__("" : "+v"(product));
#elif defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

OPTGPTQ_INLINE float rounded_to_half(float value) {
  Half numbers[kLanes] = {};
  narrow(value, numbers);
  return load_numbers(numbers)[0];
}

struct Range {
  float scale, minimum;  // numbers that float16 holds
};

OPTGPTQ_INLINE FloatVector clamped(FloatVector x, float low, float high) {
  return smaller(larger(x, every(low)), every(high));
}

// Halves to even; 0 where the scale is 0, or nothing is a number.
OPTGPTQ_INLINE FloatVector nearest_codes(FloatVector x, Range range, float limit) {
  if (!(range.scale > 0.0f)) return FloatVector{};
  const FloatVector place = (x - range.minimum) / range.scale;
  return rounded<float>(clamped(place == place ? place : FloatVector{}, 0.0f, limit));
}

inline float limit_of(const CacheSide& side) { return static_cast<float>((1 << side.bits) - 1); }

// What a range loses, an error of a number weighted by `weight`, or by 1 where that is null.
inline float loss_of_range(const float* x, const float* weight, std::int64_t count, Range range, float limit) {
  FloatVector sum{};
  for (std::int64_t index = 0; index < count; index += kLanes) {
    const std::int64_t lanes = count - index < kLanes ? count - index : kLanes;
    const FloatVector number = clamped(load<float>(x + index, lanes), -kLargestHalf, kLargestHalf);
    const FloatVector code = nearest_codes(number, range, limit);
    const FloatVector error = number - (apart(code * range.scale) + range.minimum);
    FloatVector part = error * error;
    if (weight != nullptr) part *= load<float>(weight + index, lanes);
    // Lanes beyond the last number are no numbers of this group.
    for (std::int64_t lane = lanes; lane < kLanes; ++lane) part[lane] = 0.0f;
    sum += part;
  }
  return sum_of_lanes(sum);
}

// Scale and minimum of a group: of the candidates, the first that loses least.
inline Range choose_range(const CacheSide& side, const float* x, const float* weight, std::int64_t count) {
  float low = x[0], high = x[0], unsound = 0.0f;
  std::int64_t index = 0;
  if (count >= kLanes) {
    FloatVector lows = every(x[0]), highs = every(x[0]), nothing{};
    for (; index + kLanes <= count; index += kLanes) {
      const FloatVector number = load_numbers(x + index);
      nothing += number * 0.0f;
      lows = smaller(lows, number);
      highs = larger(highs, number);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      low = lows[lane] < low ? lows[lane] : low;
      high = highs[lane] > high ? highs[lane] : high;
    }
    unsound = sum_of_lanes(nothing);
  }
  for (; index < count; ++index) {
    unsound += x[index] * 0.0f;
    low = x[index] < low ? x[index] : low;
    high = x[index] > high ? x[index] : high;
  }
  if (!(unsound == 0.0f)) return {0.0f, __builtin_nanf("")};
  low = low < -kLargestHalf ? -kLargestHalf : low > kLargestHalf ? kLargestHalf : low;
  high = high < -kLargestHalf ? -kLargestHalf : high > kLargestHalf ? kLargestHalf : high;
  const float limit = limit_of(side), middle = (low + high) / 2;
  Range best = {};
  float least = 0.0f;
  for (std::int64_t candidate = 0; candidate < side.num_ranges; ++candidate) {
    const float* shares = side.ranges + 2 * candidate;
    const float first = middle + apart((low - middle) * shares[0]), last = middle + apart((high - middle) * shares[1]);
    const Range range = {rounded_to_half((last - first) / limit), rounded_to_half(first)};
    if (side.num_ranges == 1) return range;
    const float loss = loss_of_range(x, weight, count, range, limit);
    if (candidate == 0 || loss < least) {
      least = loss;
      best = range;
    }
  }
  return best;
}

// The nearest codes of a group; `to` has room for whole vectors.
inline void encode_group(const CacheSide& side, const float* x, std::int64_t count, Range range, float* to) {
  for (std::int64_t index = 0; index < count; index += kLanes) {
    const std::int64_t lanes = count - index < kLanes ? count - index : kLanes;
    store<float>(to + index, nearest_codes(load<float>(x + index, lanes), range, limit_of(side)), lanes);
  }
}

// Pack codes of one vector into its row; bytes that fill it up are 0.
inline void pack_row(const CacheSide& side, const float* codes, std::int64_t head_dim, std::uint8_t* row) {
  const auto code = [&](std::int64_t channel) { return static_cast<std::uint8_t>(codes[channel]); };
  const std::int64_t half = head_dim / 2, quarter = head_dim / 4, eighth = head_dim / 8;
  for (std::int64_t byte = 0; byte < side.row_bytes; ++byte) row[byte] = 0;
  if (side.bits == 8) {
    for (std::int64_t channel = 0; channel < head_dim; ++channel) row[channel] = code(channel);
  } else if (side.bits == 4) {
    for (std::int64_t byte = 0; byte < half; ++byte) {
      row[byte] = static_cast<std::uint8_t>(code(byte) | code(byte + half) << 4);
    }
  } else {
    for (std::int64_t channel = 0; channel < head_dim; ++channel) {
      const int place = static_cast<int>(2 * (channel / quarter));
      row[channel % quarter] = static_cast<std::uint8_t>(row[channel % quarter] | (code(channel) & 3) << place);
    }
    if (side.bits != 3) return;
    std::uint8_t* upper = row + third_bits(head_dim);
    for (std::int64_t channel = 0; channel < head_dim; ++channel) {
      const int place = static_cast<int>(channel / eighth);
      upper[channel % eighth] = static_cast<std::uint8_t>(upper[channel % eighth] | (code(channel) >> 2) << place);
    }
  }
}

inline void write_pair(Range range, std::uint8_t* to) {
  Half pair[2];
  narrow(range.scale, pair);
  narrow(range.minimum, pair + 1);
  __builtin_memcpy(to, pair, sizeof pair);
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
