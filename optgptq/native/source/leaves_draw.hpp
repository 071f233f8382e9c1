// A random number's place in the cumulative distribution of one row, in whole numbers.
// Included once by each instruction set.
#pragma once

#include "lanes.hpp"
#include "leaves.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

constexpr int kWideLanes = OPTGPTQ_VECTOR_BYTES / sizeof(double);

// e^x for what is not above 0, to the last bit or two; below kLeast and for what is not a number: e^kLeast.
// Source: Cody and Waite, "Software manual for the elementary functions" (1980), for the reduced argument.
OPTGPTQ_INLINE DoubleVector decay_of(DoubleVector x) {
  constexpr double kLeast = -60.0, kRound = 0x1.8p52;
  constexpr double kLog2Of = 1.4426950408889634, kHigh = 0x1.62e42feep-1, kLow = 0x1.a39ef35793c76p-33;
  constexpr double kTerms[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 1.0 / 2, 1.0, 1.0};
  x = x > kLeast ? x : DoubleVector{} + kLeast;
  const DoubleVector shifted = x * kLog2Of + kRound, whole = shifted - kRound;
  const DoubleVector rest = (x - whole * kHigh) - whole * kLow;
  DoubleVector sum = DoubleVector{} + kTerms[0];
  for (int term = 1; term < 14; ++term) sum = sum * rest + kTerms[term];
  // The lowest bits of `shifted` are the whole power of two.
  return (DoubleVector)((LongVector)sum + ((LongVector)shifted << 52));
}

OPTGPTQ_INLINE LongVector weights_of(HalfFloatVector numbers, double greatest, double temperature, double scale) {
  const DoubleVector below = __builtin_convertvector(numbers, DoubleVector) - greatest;
  return __builtin_convertvector(decay_of(below / temperature) * scale, LongVector);
}

std::int64_t draw(const DrawCall& call, std::int64_t row, std::int64_t* weights) {
  const float* numbers = call.numbers + row * call.size;
  const double greatest = call.greatest[row], temperature = call.temperature[row];
  const std::int64_t whole = call.size / kWideLanes * kWideLanes, rest = call.size - whole;
  LongVector totals{};
  const auto weigh = [&](HalfFloatVector some) {
    const LongVector part = weights_of(some, greatest, temperature, call.scale);
    totals += part;
    return part;
  };
  for (std::int64_t index = 0; index < whole; index += kWideLanes) {
    HalfFloatVector some;
    __builtin_memcpy(&some, numbers + index, sizeof some);
    const LongVector part = weigh(some);
    __builtin_memcpy(weights + index, &part, sizeof part);
  }
  if (rest > 0) {
    HalfFloatVector some = HalfFloatVector{} - __builtin_inff();  // no weight behind the end
    for (std::int64_t lane = 0; lane < rest; ++lane) some[lane] = numbers[whole + lane];
    const LongVector part = weigh(some);
    for (std::int64_t lane = 0; lane < rest; ++lane) weights[whole + lane] = part[lane];
  }
  std::int64_t total = 0;
  for (int lane = 0; lane < kWideLanes; ++lane) total += totals[lane];
  // Rounding may give the total itself, which lies behind the last token.
  std::int64_t target = static_cast<std::int64_t>(call.uniform[row] * static_cast<double>(total));
  target = target < total ? target : total - 1;
  std::int64_t place = 0, sum = weights[0];
  while (sum <= target && place + 1 < call.size) sum += weights[++place];
  return place;
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
