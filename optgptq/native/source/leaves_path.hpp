// Norms, gates, rotary positions and the greatest number for one instruction set.
#pragma once

#include "leaves.hpp"
#include "leaves_draw.hpp"
#include "leaves_numbers.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Squares are summed in this many lanes on every path.
constexpr int kSums = 16;
constexpr int kSumVectors = kSums / kLanes;

template <class N, class Action>
OPTGPTQ_INLINE void with_weight(const void* weight, NumberType type, const Action& action) {
  switch (weight == nullptr ? NumberType::kFloat : type) {
    case NumberType::kFloat: return action(static_cast<const float*>(weight));
    case NumberType::kBFloat16: return action(static_cast<const BFloat16*>(weight));
    case NumberType::kHalf: return action(static_cast<const Half*>(weight));
  }
}

struct Squares {
  FloatVector sums[kSumVectors];

  OPTGPTQ_INLINE void add(FloatVector value, std::int64_t vector) {
    FloatVector& sum = sums[vector % kSumVectors];
    sum = multiply_add(value, value, sum);
  }

  OPTGPTQ_INLINE float factor(std::int64_t size, double epsilon) const {
    float total = 0.0f;
    for (int vector = 0; vector < kSumVectors; ++vector) {
      for (int lane = 0; lane < kLanes; ++lane) total += sums[vector][lane];
    }
    return 1.0f / __builtin_sqrtf(total / static_cast<float>(size) + static_cast<float>(epsilon));
  }
};

template <class N, class W>
void norm_row(const SumNormCall& call, const W* weight, std::int64_t row) {
  const std::int64_t size = call.size, first = row * size;
  N* input = static_cast<N*>(call.input) + first;
  N* output = static_cast<N*>(call.output) + first;
  const N* residual = call.residual == nullptr ? nullptr : static_cast<const N*>(call.residual) + first;
  Squares squares{};
  for (std::int64_t index = 0; index < size; index += kLanes) {
    const std::int64_t count = size - index;
    FloatVector value = load_up_to(input + index, count);
    if (residual != nullptr) {
      value = as_stored(value + load_up_to(residual + index, count), input);
      store_up_to(input + index, value, count);
    }
    squares.add(value, index / kLanes);
  }
  const float factor = squares.factor(size, call.epsilon);
  for (std::int64_t index = 0; index < size; index += kLanes) {
    const std::int64_t count = size - index;
    FloatVector value = load_up_to(input + index, count) * factor;
    if (weight != nullptr) value = value * load_up_to(weight + index, count);
    store_up_to(output + index, value, count);
  }
}

template <class N>
void norm_numbers(const SumNormCall& call, std::int64_t row) {
  with_weight<N>(call.weight, call.weight_type, [&](const auto* weight) { norm_row<N>(call, weight, row); });
}

void sum_and_norm(const SumNormCall& call, std::int64_t row) {
  switch (call.type) {
    case NumberType::kFloat: return norm_numbers<float>(call, row);
    case NumberType::kBFloat16: return norm_numbers<BFloat16>(call, row);
    case NumberType::kHalf: return norm_numbers<Half>(call, row);
  }
}

// 1 / (1 + exp(-x)); only exponentials of what is not above 0 are taken.
OPTGPTQ_INLINE FloatVector logistic(FloatVector x) {
  const FloatVector decay = exponential(-magnitude(x));
  const FloatVector one = every(1.0f);
  return (x < 0.0f ? decay : one) / (one + decay);
}

OPTGPTQ_INLINE FloatVector error_function(FloatVector x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_erff(x[lane]);
  return x;
}

template <Gate kind>
OPTGPTQ_INLINE FloatVector activated(FloatVector x) {
  if (kind == Gate::kSilu) return x * logistic(x);
  if (kind == Gate::kQuickGelu) return x * logistic(x * 1.702f);
  if (kind == Gate::kRelu) return x < 0.0f ? FloatVector{} : x;
  if (kind == Gate::kGelu) return x * 0.5f * (1.0f + error_function(x * 0.707106781f));
  const FloatVector inner = (x + x * x * x * 0.044715f) * 0.797884561f;
  return x * 0.5f * (1.0f + tangent(inner));
}

template <class N, Gate kind>
void gate_row(const GatedCall& call, std::int64_t row, std::int64_t begin, std::int64_t end) {
  const N* gate = static_cast<const N*>(call.gate) + row * call.gate_stride;
  const N* up = static_cast<const N*>(call.up) + row * call.up_stride;
  N* output = static_cast<N*>(call.output) + row * call.size;
  for (std::int64_t index = begin; index < end; index += kLanes) {
    const std::int64_t count = end - index;
    const FloatVector value = activated<kind>(load_up_to(gate + index, count));
    store_up_to(output + index, value * load_up_to(up + index, count), count);
  }
}

template <class N>
void gate_numbers(const GatedCall& call, std::int64_t row, std::int64_t begin, std::int64_t end) {
  switch (call.kind) {
    case Gate::kSilu: return gate_row<N, Gate::kSilu>(call, row, begin, end);
    case Gate::kRelu: return gate_row<N, Gate::kRelu>(call, row, begin, end);
    case Gate::kGelu: return gate_row<N, Gate::kGelu>(call, row, begin, end);
    case Gate::kGeluTanh: return gate_row<N, Gate::kGeluTanh>(call, row, begin, end);
    case Gate::kQuickGelu: return gate_row<N, Gate::kQuickGelu>(call, row, begin, end);
  }
}

void gated(const GatedCall& call, std::int64_t row, std::int64_t begin, std::int64_t end) {
  switch (call.type) {
    case NumberType::kFloat: return gate_numbers<float>(call, row, begin, end);
    case NumberType::kBFloat16: return gate_numbers<BFloat16>(call, row, begin, end);
    case NumberType::kHalf: return gate_numbers<Half>(call, row, begin, end);
  }
}

std::int64_t greatest(const float* numbers, std::int64_t size) {
  FloatVector top = every(-__builtin_inff());
  IntVector is_none{};
  for (std::int64_t index = 0; index < size; index += kLanes) {
    const std::int64_t count = size - index;
    FloatVector value = load_up_to(numbers + index, count);
    for (std::int64_t lane = count; lane < kLanes; ++lane) value[lane] = numbers[size - 1];
    top = larger(value, top);
    is_none |= (IntVector)(value != value);
  }
  bool has_none = false;
  for (int lane = 0; lane < kLanes; ++lane) has_none = has_none || is_none[lane] != 0;
  const float wanted = largest_lane(top);
  // Two looks: the second ends early, at a compare for each number.
  std::int64_t index = 0;
  while (index < size && (has_none ? numbers[index] == numbers[index] : numbers[index] != wanted)) ++index;
  return index < size ? index : 0;
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq

#include "leaves_heads.hpp"
