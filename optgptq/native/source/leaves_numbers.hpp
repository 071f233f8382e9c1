// Vectors of floats rounded into memory, and numbers of any type read one block after the other.
// Included once by each instruction set.
#pragma once

#include "paged_attention_numbers.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

typedef std::uint32_t BitVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES)));

OPTGPTQ_INLINE void store_numbers(float* to, FloatVector value) { __builtin_memcpy(to, &value, sizeof value); }

// To the nearest, halves to even; what is not a number stays none.
OPTGPTQ_INLINE void store_numbers(BFloat16* to, FloatVector value) {
  const BitVector bits = (BitVector)value;
  const BitVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitVector none = BitVector{} + 0x7fc0u;
  const ShortVector narrow = __builtin_convertvector(value == value ? rounded : none, ShortVector);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

OPTGPTQ_INLINE void store_numbers(Half* to, FloatVector value) {
#if OPTGPTQ_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, 0));
#elif OPTGPTQ_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, 0));
#else
  for (int lane = 0; lane < kLanes; ++lane) narrow(value[lane], to + lane);
#endif
}

template <class N>
OPTGPTQ_INLINE void store_some(N* to, FloatVector value, std::int64_t count) {
  for (std::int64_t lane = 0; lane < count; ++lane) narrow(value[lane], to + lane);
}

// `count` lanes, which may be all; those behind are zero.
template <class N>
OPTGPTQ_INLINE FloatVector load_up_to(const N* from, std::int64_t count) {
  return count >= kLanes ? load_numbers(from) : load_some(from, count);
}

template <class N>
OPTGPTQ_INLINE void store_up_to(N* to, FloatVector value, std::int64_t count) {
  if (count >= kLanes) {
    store_numbers(to, value);
  } else {
    store_some(to, value, count);
  }
}

// What a store to memory of this type would leave of the numbers.
OPTGPTQ_INLINE FloatVector as_stored(FloatVector value, const float*) { return value; }

template <class N>
OPTGPTQ_INLINE FloatVector as_stored(FloatVector value, const N*) {
  N numbers[kLanes];
  store_numbers(numbers, value);
  return load_numbers(numbers);
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
