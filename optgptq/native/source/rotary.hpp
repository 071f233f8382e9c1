// Rotary positions of bfloat16 heads, in place.
#pragma once

#include <cstdint>

namespace optgptq {

// Heads `[B, S, N, D]`, of which the first `2 * half` numbers are rotated; the numbers of a head are side by side, all
// else is any number of numbers apart. Tables `[S, half]` without gaps.
struct RotaryCall {
  std::uint16_t* heads;
  const std::uint16_t* cosine;
  const std::uint16_t* sine;
  std::int64_t sequence_stride, token_stride, head_stride;
  std::int64_t num_sequences, num_tokens, num_heads, half;
};

// Every product and every sum is rounded to bfloat16, as torch does: the same bits.
void rotate_bfloat16(const RotaryCall& call, std::int64_t num_threads);

}  // namespace optgptq
