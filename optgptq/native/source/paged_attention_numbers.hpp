// Numbers of pages as vectors of floats, and the functions that attention needs of them.
// Included once by each instruction set.
#pragma once

#include "lanes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

constexpr int kLanes = OPTGPTQ_VECTOR_BYTES / 4;

typedef std::uint16_t ShortVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES / 2)));

struct BFloat16 {
  std::uint16_t bits;
};

struct Half {
  std::uint16_t bits;
};

// A sum with zero, the general form, is not left out by compilers: it would turn -0 into 0.
OPTGPTQ_INLINE FloatVector every(float value) {
#if OPTGPTQ_VECTOR_BYTES == 64
  return (FloatVector)_mm512_set1_ps(value);
#elif OPTGPTQ_VECTOR_BYTES == 32
  return (FloatVector)_mm256_set1_ps(value);
#else
  return FloatVector{} + value;
#endif
}

// One rounding where there is an instruction for it; the same everywhere in a path.
OPTGPTQ_INLINE FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) {
#if OPTGPTQ_VECTOR_BYTES == 64
  return (FloatVector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif OPTGPTQ_VECTOR_BYTES == 32
  return (FloatVector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

OPTGPTQ_INLINE FloatVector load_numbers(const float* from) {
  FloatVector numbers;
  __builtin_memcpy(&numbers, from, sizeof numbers);
  return numbers;
}

OPTGPTQ_INLINE IntVector load_bits(const std::uint16_t* from) {
  ShortVector bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return __builtin_convertvector(bits, IntVector);
}

OPTGPTQ_INLINE FloatVector load_numbers(const BFloat16* from) { return (FloatVector)(load_bits(&from->bits) << 16); }

OPTGPTQ_INLINE FloatVector load_numbers(const Half* from) {
#if OPTGPTQ_VECTOR_BYTES == 64
  return (FloatVector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif OPTGPTQ_VECTOR_BYTES == 32
  return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  const IntVector bits = load_bits(&from->bits), size = bits & 0x7fff;
  // The exponents' biases differ by 112; numbers below the normal ones come out right too.
  const IntVector finite = (IntVector)((FloatVector)(size << 13) * 0x1p112f);
  const IntVector rest = (size << 13) | 0x7f800000;
  return (FloatVector)((size >= 0x7c00 ? rest : finite) | ((bits & 0x8000) << 16));
#endif
}

// The first `count` numbers; nothing beyond them is read.
template <class N>
OPTGPTQ_INLINE FloatVector load_some(const N* from, std::int64_t count) {
  N numbers[kLanes] = {};
  for (std::int64_t lane = 0; lane < count; ++lane) numbers[lane] = from[lane];
  return load_numbers(numbers);
}

OPTGPTQ_INLINE std::int32_t bits_of(float value) {
  std::int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// To the nearest, halves to even; what is not a number stays none.
OPTGPTQ_INLINE void narrow(float value, float* to) { *to = value; }

OPTGPTQ_INLINE void narrow(float value, BFloat16* to) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bits_of(value));
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

OPTGPTQ_INLINE void narrow(float value, Half* to) {
#if OPTGPTQ_VECTOR_BYTES > 16
  to->bits = static_cast<std::uint16_t>(_cvtss_sh(value, 0));
#else
  const std::uint32_t bits = static_cast<std::uint32_t>(bits_of(value));
  const std::uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  float magnitude;
  __builtin_memcpy(&magnitude, &size, sizeof magnitude);
  // Below 2^-14 half precision has multiples of 2^-24, which is the spacing of float around 0.5.
  const std::uint32_t small = static_cast<std::uint32_t>(bits_of(magnitude + 0.5f)) - 0x3f000000u;
  const std::uint32_t normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  const std::uint32_t rounded = size < 0x38800000u ? small : size >= 0x477ff000u ? 0x7c00u : normal;
  to->bits = static_cast<std::uint16_t>(sign | (size > 0x7f800000u ? 0x7e00u : rounded));
#endif
}

OPTGPTQ_INLINE FloatVector rounded_to_bfloat16(FloatVector value) {
  const IntVector bits = (IntVector)value;
  return (FloatVector)((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff);
}

OPTGPTQ_INLINE float largest_lane(FloatVector a) {
#if OPTGPTQ_VECTOR_BYTES == 64
  return _mm512_reduce_max_ps((__m512)a);
#else
  float largest = a[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = a[lane] > largest ? a[lane] : largest;
  return largest;
#endif
}

OPTGPTQ_INLINE float sum_of_lanes(FloatVector a) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += a[lane];
  return sum;
}

// exp(x) for x <= 0 within 2e-7 of itself, 1 for 0, and 0 below -87. What is not a number stays none.
// The polynomial interpolates (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2.
OPTGPTQ_INLINE FloatVector exponential(FloatVector x) {
  const FloatVector limit = every(-87.0f);
  // In this order the result is `x` where it is not a number.
  const FloatVector kept = larger(limit, x);
  const FloatVector turns = rounded<float>(kept * 1.44269504f);
  // 355 / 512 and what it lacks of log(2): the first product is exact.
  FloatVector rest = multiply_add(turns, every(-0.693359375f), kept);
  rest = multiply_add(turns, every(2.12194440e-4f), rest);
  FloatVector power = multiply_add(every(1.393373322e-3f), rest, every(8.363235385e-3f));
  power = multiply_add(power, rest, every(4.166646417e-2f));
  power = multiply_add(power, rest, every(1.666657664e-1f));
  power = multiply_add(power, rest, every(5.000000014e-1f));
  power = multiply_add(power, rest * rest, rest) + 1.0f;
  const FloatVector result = (FloatVector)((IntVector)power + (__builtin_convertvector(turns, IntVector) << 23));
  return x < limit ? FloatVector{} : (x == x ? result : x);
}

// tanh(x) within 3e-7 of itself.
OPTGPTQ_INLINE FloatVector tangent(FloatVector x) {
  const FloatVector size = magnitude(x), square = x * x;
  FloatVector power = multiply_add(every(2.347753465e-3f), square, every(-8.391389782e-3f));
  power = multiply_add(power, square, every(2.178309564e-2f));
  power = multiply_add(power, square, every(-5.396096686e-2f));
  power = multiply_add(power, square, every(1.333331064e-1f));
  power = multiply_add(power, square, every(-3.333333322e-1f));
  const FloatVector small = multiply_add(power * square, x, x);
  const FloatVector decay = exponential(size * -2.0f);
  const FloatVector large = (1.0f - decay) / (1.0f + decay);
  return size < 0.6f ? small : (x < 0.0f ? -large : large);
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
