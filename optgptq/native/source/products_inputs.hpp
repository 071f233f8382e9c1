// Activations as codes of 8 bits with one scale for each block of 32 columns.
// Included once by each instruction set.
#pragma once

#include "products_codes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

template <class N>
OPTGPTQ_INLINE void widen_row(const N* from, const ProductRows& rows, float* row) {
  std::int64_t column = 0;
  if (rows.column_order == nullptr) {
    for (; column + kLanes <= rows.num_columns; column += kLanes) {
      store_numbers(load_numbers(from + column), row + column);
    }
  }
  for (; column < rows.num_columns; ++column) {
    const N* number = from + (rows.column_order == nullptr ? column : rows.column_order[column]);
    row[column] = load_some(number, 1)[0];
  }
}

// Columns beyond the last one are zero.
void widen(const ProductRows& rows, std::int64_t token, float* row, std::int64_t num_blocks) {
  const std::int64_t first = token * rows.stride;
  if (rows.type == kFloat) {
    widen_row(static_cast<const float*>(rows.numbers) + first, rows, row);
  } else if (rows.type == kBFloat16) {
    widen_row(static_cast<const BFloat16*>(rows.numbers) + first, rows, row);
  } else {
    widen_row(static_cast<const Half*>(rows.numbers) + first, rows, row);
  }
  for (std::int64_t column = rows.num_columns; column < num_blocks * kBlockColumns; ++column) row[column] = 0.0f;
}

// Halves to even. Not by adding and taking away a number: compilers would join the product before it with the sum.
OPTGPTQ_INLINE IntVector rounded_integers(FloatVector numbers) {
#if OPTGPTQ_VECTOR_BYTES == 64
  return (IntVector)_mm512_cvtps_epi32((__m512)numbers);
#elif OPTGPTQ_VECTOR_BYTES == 32
  return (IntVector)_mm256_cvtps_epi32((__m256)numbers);
#else
  IntVector integers;
  for (int lane = 0; lane < kLanes; ++lane) integers[lane] = static_cast<std::int32_t>(__builtin_rintf(numbers[lane]));
  return integers;
#endif
}

// Below this the factor would not be finite; what is smaller counts as zero.
constexpr float kSmallest = 0x1p-120f;

OPTGPTQ_INLINE std::int32_t largest_integer(IntVector a) {
#if OPTGPTQ_VECTOR_BYTES == 64
  return _mm512_reduce_max_epi32((__m512i)a);
#else
  std::int32_t largest = a[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = a[lane] > largest ? a[lane] : largest;
  return largest;
#endif
}

OPTGPTQ_INLINE std::int32_t sum_of_integers(IntVector a) {
#if OPTGPTQ_VECTOR_BYTES == 64
  return _mm512_reduce_add_epi32((__m512i)a);
#else
  std::int32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += a[lane];
  return sum;
#endif
}

// Codes and scale of a block; returns the sum of the codes. A block with a number that is not finite has no scale.
OPTGPTQ_INLINE std::int32_t quantize_block(const float* row, std::int8_t* codes, float* scale) {
  constexpr int kVectors = kBlockColumns / kLanes;
  constexpr std::int32_t kInfinity = 0x7f800000;
  // Without their sign, floats are in the order of their bits, and what is not finite is above all others.
  FloatVector numbers[kVectors];
  IntVector most{};
  for (int index = 0; index < kVectors; ++index) {
    numbers[index] = load_numbers(row + index * kLanes);
    const IntVector magnitudes = (IntVector)numbers[index] & 0x7fffffff;
    most = magnitudes > most ? magnitudes : most;
  }
  const std::int32_t bits = largest_integer(most);
  float largest;
  __builtin_memcpy(&largest, &bits, sizeof largest);
  *scale = bits < kInfinity ? largest / 127.0f : __builtin_nanf("");
  const bool is_usable = bits < kInfinity && largest >= kSmallest;
  const FloatVector factor = every(is_usable ? 127.0f / largest : 0.0f);
  IntVector sums{};
  for (int index = 0; index < kVectors; ++index) {
    // A number that is not finite has no code.
    const IntVector integers = is_usable ? rounded_integers(numbers[index] * factor) : IntVector{};
    sums += integers;
    const SmallCodeVector bytes = __builtin_convertvector(integers, SmallCodeVector);
    __builtin_memcpy(codes + index * kLanes, &bytes, sizeof bytes);
  }
  return sum_of_integers(sums);
}

void quantize(const ProductRows& rows, std::int64_t token, float* row, const ProductInputs& inputs) {
  widen(rows, token, row, inputs.num_blocks);
  const std::int64_t group_blocks = inputs.num_blocks / inputs.num_groups;
  for (std::int64_t group = 0; group < inputs.num_groups; ++group) {
    float sum = 0.0f;
    for (std::int64_t block = group * group_blocks; block < (group + 1) * group_blocks; ++block) {
      const std::int64_t at = block * inputs.num_tokens + token;
      float* scale = inputs.scales + at;
      const std::int32_t of_codes =
          quantize_block(row + block * kBlockColumns, inputs.codes + at * kBlockColumns, scale);
      sum = __builtin_fmaf(static_cast<float>(of_codes), *scale, sum);
    }
    inputs.sums[group * inputs.num_tokens + token] = sum;
  }
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
