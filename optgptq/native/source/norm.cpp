// RMS norm in one pass over each row, where torch makes five tensors.
#include "norm.hpp"

#include <cmath>
#include <cstring>

#include "threads.hpp"

namespace optgptq {
namespace {

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kRowsPerItem = 64;
// Numbers below which a second thread costs more than it does.
constexpr std::int64_t kNumbersPerThread = 1 << 21;

inline float widened(std::uint16_t number) {
  const std::uint32_t bits = static_cast<std::uint32_t>(number) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, halves to even; what is not a number stays none.
inline std::uint16_t narrowed(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void norm_row(const std::uint16_t* input, const std::uint16_t* weight, std::uint16_t* output, std::int64_t size,
              float epsilon) {
  float squares[kLanes] = {};
  std::int64_t column = 0;
  for (; column + kLanes <= size; column += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = widened(input[column + lane]);
      squares[lane] += value * value;
    }
  }
  for (std::int64_t lane = 0; column + lane < size; ++lane) {
    const float value = widened(input[column + lane]);
    squares[lane] += value * value;
  }
  float sum = 0;
  for (std::int64_t lane = 0; lane < kLanes; ++lane) sum += squares[lane];
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(size) + epsilon);
  for (std::int64_t index = 0; index < size; ++index) {
    output[index] = narrowed(widened(input[index]) * factor * widened(weight[index]));
  }
}

}  // namespace

void rms_norm_bfloat16(const NormCall& call, std::int64_t num_threads) {
  const std::int64_t num_items = (call.num_rows + kRowsPerItem - 1) / kRowsPerItem;
  const std::int64_t worth = call.num_rows * call.size / kNumbersPerThread + 1;
  const std::int64_t most = num_items < num_threads ? num_items : num_threads;
  share_out(num_items, worth < most ? worth : most, [&](std::int64_t, std::int64_t item) {
    const std::int64_t begin = item * kRowsPerItem;
    const std::int64_t end = begin + kRowsPerItem < call.num_rows ? begin + kRowsPerItem : call.num_rows;
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t first = row * call.size;
      norm_row(call.input + first, call.weight, call.output + first, call.size, static_cast<float>(call.epsilon));
    }
  });
}

}  // namespace optgptq
