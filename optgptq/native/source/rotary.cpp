// Rotary positions in one pass over the heads, where torch makes five over strided halves.
#include "rotary.hpp"

#include <cstring>

#include "threads.hpp"

namespace optgptq {
namespace {

constexpr std::int64_t kTokensPerItem = 64;
// Numbers below which a second thread costs more than it does.
constexpr std::int64_t kNumbersPerThread = 1 << 20;

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

// A product of two bfloat16 numbers is exact in float, so it does not matter whether the sum is fused with it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void rotate_head(std::uint16_t* __restrict head, const std::uint16_t* __restrict cosine,
                 const std::uint16_t* __restrict sine, std::int64_t half) {
  std::uint16_t* __restrict other = head + half;
  for (std::int64_t index = 0; index < half; ++index) {
    const float first = widened(head[index]), second = widened(other[index]);
    const float along = widened(cosine[index]), across = widened(sine[index]);
    const std::uint16_t turned = narrowed(widened(narrowed(first * along)) - second * across);
    // The second half meets the first as it was.
    other[index] = narrowed(widened(narrowed(second * along)) + first * across);
    head[index] = turned;
  }
}

}  // namespace

void rotate_bfloat16(const RotaryCall& call, std::int64_t num_threads) {
  const std::int64_t parts = (call.num_tokens + kTokensPerItem - 1) / kTokensPerItem;
  const std::int64_t num_items = call.num_sequences * parts;
  const std::int64_t numbers = call.num_sequences * call.num_tokens * call.num_heads * 2 * call.half;
  const std::int64_t worth = numbers / kNumbersPerThread + 1;
  const std::int64_t most = num_items < num_threads ? num_items : num_threads;
  share_out(num_items, worth < most ? worth : most, [&](std::int64_t, std::int64_t item) {
    const std::int64_t begin = item % parts * kTokensPerItem;
    const std::int64_t end = begin + kTokensPerItem < call.num_tokens ? begin + kTokensPerItem : call.num_tokens;
    std::uint16_t* sequence = call.heads + item / parts * call.sequence_stride;
    for (std::int64_t token = begin; token < end; ++token) {
      for (std::int64_t head = 0; head < call.num_heads; ++head) {
        rotate_head(sequence + token * call.token_stride + head * call.head_stride, call.cosine + token * call.half,
                    call.sine + token * call.half, call.half);
      }
    }
  });
}

}  // namespace optgptq

extern "C" __attribute__((visibility("default"))) int optgptq_rotate_bfloat16(
    const optgptq::RotaryCall* call, std::int64_t num_threads) {
  optgptq::rotate_bfloat16(*call, num_threads);
  return 0;
}
