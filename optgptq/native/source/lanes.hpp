// Vectors whose lanes are rows of a weight. Included once by each instruction set, which has defined OPTGPTQ_PATH and
// OPTGPTQ_VECTOR_BYTES. Nothing here may be a template of the standard library: its code would be compiled for this
// instruction set and could be linked into another.
#pragma once

#include <cstdint>

#define OPTGPTQ_INLINE inline __attribute__((always_inline))

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

typedef float FloatVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES)));
typedef std::int32_t IntVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES)));
typedef std::int64_t LongVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES)));
typedef float HalfFloatVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES / 2)));

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = FloatVector;
  using Index = IntVector;
  using Integer = std::int32_t;
  static constexpr std::int64_t count = OPTGPTQ_VECTOR_BYTES / 4;
  // 1.5 * 2^23: adding and taking it away leaves no room for a fraction.
  static constexpr float rounding = 12582912.0f;
};

template <>
struct Lanes<double> {
  using Vector = DoubleVector;
  using Index = LongVector;
  using Integer = std::int64_t;
  static constexpr std::int64_t count = OPTGPTQ_VECTOR_BYTES / 8;
  static constexpr double rounding = 6755399441055744.0;  // 1.5 * 2^52
};

// Whole numbers from 0 to 255.
template <class V>
OPTGPTQ_INLINE void store_codes(std::uint8_t* to, V codes, std::int64_t num_lanes) {
  for (std::int64_t lane = 0; lane < num_lanes; ++lane) to[lane] = static_cast<std::uint8_t>(codes[lane]);
}

template <class V>
OPTGPTQ_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

template <class V>
OPTGPTQ_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

#if OPTGPTQ_VECTOR_BYTES == 64
// Compilers make two instructions of the general form where comparisons give bit masks.
OPTGPTQ_INLINE FloatVector smaller(FloatVector a, FloatVector b) {
  return (FloatVector)_mm512_min_ps((__m512)a, (__m512)b);
}
OPTGPTQ_INLINE FloatVector larger(FloatVector a, FloatVector b) {
  return (FloatVector)_mm512_max_ps((__m512)a, (__m512)b);
}
OPTGPTQ_INLINE DoubleVector smaller(DoubleVector a, DoubleVector b) {
  return (DoubleVector)_mm512_min_pd((__m512d)a, (__m512d)b);
}
OPTGPTQ_INLINE DoubleVector larger(DoubleVector a, DoubleVector b) {
  return (DoubleVector)_mm512_max_pd((__m512d)a, (__m512d)b);
}
OPTGPTQ_INLINE void store_codes(std::uint8_t* to, FloatVector codes, std::int64_t num_lanes) {
  const __mmask16 rows = static_cast<__mmask16>((1u << num_lanes) - 1);
  _mm512_mask_cvtepi32_storeu_epi8(to, rows, _mm512_cvtps_epi32((__m512)codes));
}
#endif

template <class V>
OPTGPTQ_INLINE V magnitude(V a) {
  return larger(a, -a);
}

// Lanes beyond the last row are zero.
template <class T>
OPTGPTQ_INLINE typename Lanes<T>::Vector load(const T* from, std::int64_t num_lanes) {
  typename Lanes<T>::Vector lanes{};
  if (num_lanes == Lanes<T>::count) {
    __builtin_memcpy(&lanes, from, sizeof lanes);
  } else {
    for (std::int64_t lane = 0; lane < num_lanes; ++lane) lanes[lane] = from[lane];
  }
  return lanes;
}

template <class T>
OPTGPTQ_INLINE void store(T* to, typename Lanes<T>::Vector lanes, std::int64_t num_lanes) {
  if (num_lanes == Lanes<T>::count) {
    __builtin_memcpy(to, &lanes, sizeof lanes);
  } else {
    for (std::int64_t lane = 0; lane < num_lanes; ++lane) to[lane] = lanes[lane];
  }
}

// Halves to even; right within half of the largest exact integer, and near itself beyond.
template <class T>
OPTGPTQ_INLINE typename Lanes<T>::Vector rounded(typename Lanes<T>::Vector a) {
  return (a + Lanes<T>::rounding) - Lanes<T>::rounding;
}

// The nearest number that bfloat16 and then float16 hold, as `optgptq.grids.affine.storable_scale` defines it.
template <class F, class I>
OPTGPTQ_INLINE F storable_float(F scale) {
  I bits = (I)scale;
  // Halves to even, in the upper 16 bits; the sign bit takes no part in the carry of any finite number.
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
  const F zero{};
  F value = smaller(larger((F)bits, zero - 65280.0f), zero + 65280.0f);
  // Float16 below 2^-14 is multiples of 2^-24, which is the spacing of float32 around 0.75.
  const F coarse = (value + 0.75f) - 0.75f;
  value = magnitude(value) < 0x1p-14f ? coarse : value;
  const F smallest = scale < 0.0f ? zero - 0x1p-24f : zero + 0x1p-24f;
  return value == 0.0f ? smallest : value;
}

typedef std::int32_t HalfIntVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES / 2)));

OPTGPTQ_INLINE FloatVector storable(FloatVector scale) { return storable_float<FloatVector, IntVector>(scale); }

OPTGPTQ_INLINE DoubleVector storable(DoubleVector scale) {
  const HalfFloatVector single = __builtin_convertvector(scale, HalfFloatVector);
  return __builtin_convertvector((storable_float<HalfFloatVector, HalfIntVector>(single)), DoubleVector);
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
