// Codes in registers, sums of their products with quads of activations, and numbers in and out.
// Included once by each instruction set.
#pragma once

#include "paged_attention_numbers.hpp"
#include "products.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// A tile of 16 rows is so many vectors.
constexpr int kParts = 64 / OPTGPTQ_VECTOR_BYTES;

typedef std::uint8_t ByteVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES)));
typedef std::uint16_t WideShortVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES)));
typedef std::uint8_t SmallByteVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES / 4)));
typedef std::int8_t SmallCodeVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES / 4)));
typedef std::int16_t SmallShortVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES / 2)));

// One rounding on every path, so that all have the same bits.
OPTGPTQ_INLINE FloatVector fused(FloatVector a, FloatVector b, FloatVector c) {
#if OPTGPTQ_VECTOR_BYTES > 16
  return multiply_add(a, b, c);
#else
  FloatVector sum;
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return sum;
#endif
}

OPTGPTQ_INLINE ByteVector load_bytes(const std::uint8_t* from) {
  ByteVector bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return bytes;
}

// Kept in a register where there are 32 of them: compilers would read it again for each of its uses.
OPTGPTQ_INLINE ByteVector load_once(const std::uint8_t* from) {
  ByteVector bytes = load_bytes(from);
#if OPTGPTQ_VECTOR_BYTES == 64
  asm("" : "+v"(bytes));
#endif
  return bytes;
}

// Bits that cross the border of two bytes are masked by the caller.
template <int places>
OPTGPTQ_INLINE ByteVector turned_down(ByteVector bytes) {
  if constexpr (places == 0) return bytes;
  return (ByteVector)((WideShortVector)bytes >> places);
}

template <int places>
OPTGPTQ_INLINE ByteVector turned_up(ByteVector bytes) {
  if constexpr (places == 0) return bytes;
  return (ByteVector)((WideShortVector)bytes << places);
}

// The codes of quad `index` of a block, of the rows of vector `part`.
template <int bits, int index>
OPTGPTQ_INLINE ByteVector quad_codes(const std::uint8_t* block, int part) {
  const std::uint8_t* from = block + part * OPTGPTQ_VECTOR_BYTES;
  if constexpr (bits == 8) return load_bytes(from + index * kChunk);
  if constexpr (bits == 4) return turned_down<index / 4 * 4>(load_bytes(from + index % 4 * kChunk)) & 15;
  if constexpr (bits == 2) return turned_down<index / 2 * 2>(load_bytes(from + index % 2 * kChunk)) & 3;
  if constexpr (bits == 1) return turned_down<index>(load_bytes(from)) & 1;
  const ByteVector high = load_bytes(from + 2 * kChunk);
  ByteVector third;
  if constexpr (index < 2) {
    third = turned_up<2 - index>(high);
  } else {
    third = turned_down<index - 2>(high);
  }
  return quad_codes<2, index>(block, part) | (third & 4);
}

template <int bits>
constexpr std::int64_t block_bytes() {
  return bits * kChunk;
}

// Ask for the chunks of the block so far behind one, but for 0 bytes.
template <int chunks>
OPTGPTQ_INLINE void ask_ahead(const std::uint8_t* block, std::int64_t bytes) {
  if (bytes == 0) return;
  for (int chunk = 0; chunk < chunks; ++chunk) __builtin_prefetch(block + bytes + chunk * kChunk, 0, 2);
}

// Sums of the products of a block, one for each row. Without an instruction for products of bytes they have 16 bits:
// 8 pairs of codes below 16 with activations fit, and so do 4 pairs of codes below 29. Codes of 8 bits are two halves then.
#if defined(OPTGPTQ_VNNI) || OPTGPTQ_VECTOR_BYTES == 16
constexpr bool kWholeBytes = true;
#else
constexpr bool kWholeBytes = false;
#endif

template <int bits>
struct BlockSums {
  IntVector halves[!kWholeBytes && bits == 8 ? 2 : 1];
};

#if OPTGPTQ_VECTOR_BYTES > 16 && !defined(OPTGPTQ_VNNI)
OPTGPTQ_INLINE IntVector add_pairs(IntVector sums, ByteVector codes, std::int32_t quad) {
#if OPTGPTQ_VECTOR_BYTES == 64
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(quad));
  sums = (IntVector)_mm512_add_epi16((__m512i)sums, pairs);
#else
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(quad));
  sums = (IntVector)_mm256_add_epi16((__m256i)sums, pairs);
#endif
  // Added here and now: compilers would put all sums off, and have no registers for them.
  asm("" : "+v"(sums));
  return sums;
}

OPTGPTQ_INLINE IntVector joined_pairs(IntVector sums) {
#if OPTGPTQ_VECTOR_BYTES == 64
  return (IntVector)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1));
#else
  return (IntVector)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
#endif
}
#endif

// Add, for each row, the 4 products of its codes with the bytes of `quad`.
template <int bits>
OPTGPTQ_INLINE void add_products(BlockSums<bits>& sums, ByteVector codes, std::int32_t quad) {
#if defined(OPTGPTQ_VNNI)
  sums.halves[0] = (IntVector)_mm512_dpbusd_epi32((__m512i)sums.halves[0], (__m512i)codes, _mm512_set1_epi32(quad));
#elif OPTGPTQ_VECTOR_BYTES > 16
  if constexpr (bits == 8) {
    sums.halves[0] = add_pairs(sums.halves[0], codes & 15, quad);
    sums.halves[1] = add_pairs(sums.halves[1], turned_down<4>(codes) & 15, quad);
  } else {
    sums.halves[0] = add_pairs(sums.halves[0], codes, quad);
  }
#else
  const IntVector words = (IntVector)codes;
  std::int8_t numbers[4];
  __builtin_memcpy(numbers, &quad, sizeof numbers);
  for (int column = 0; column < 4; ++column) {
    sums.halves[0] += ((words >> (8 * column)) & 255) * static_cast<std::int32_t>(numbers[column]);
  }
#endif
}

template <int bits>
OPTGPTQ_INLINE IntVector whole_sums(const BlockSums<bits>& sums) {
#if OPTGPTQ_VECTOR_BYTES > 16 && !defined(OPTGPTQ_VNNI)
  if constexpr (bits == 8) return joined_pairs(sums.halves[0]) + (joined_pairs(sums.halves[1]) << 4);
  return joined_pairs(sums.halves[0]);
#else
  return sums.halves[0];
#endif
}

OPTGPTQ_INLINE std::int32_t quad_at(const std::int8_t* codes, std::int64_t index) {
  std::int32_t quad;
  __builtin_memcpy(&quad, codes + 4 * index, sizeof quad);
  return quad;
}

OPTGPTQ_INLINE FloatVector floats(IntVector numbers) { return __builtin_convertvector(numbers, FloatVector); }

// Coefficients of the rows of vector `part`; `at` counts tiles and groups.
OPTGPTQ_INLINE FloatVector coefficients(const void* from, std::int64_t type, std::int64_t at, int part) {
  const std::int64_t first = at * kTileRows + part * kLanes;
  if (type == kFloat) return load_numbers(static_cast<const float*>(from) + first);
  return load_numbers(static_cast<const Half*>(from) + first);
}

OPTGPTQ_INLINE FloatVector zero_points(const AffineCodes& weight, std::int64_t at, int part) {
  const std::int64_t first = at * kTileRows + part * kLanes;
  if (weight.zero_type == kByteZeros) {
    SmallByteVector bytes;
    __builtin_memcpy(&bytes, static_cast<const std::uint8_t*>(weight.zero_points) + first, sizeof bytes);
    return floats(__builtin_convertvector(bytes, IntVector));
  }
  if (weight.zero_type == kShortZeros) {
    SmallShortVector shorts;
    __builtin_memcpy(&shorts, static_cast<const std::int16_t*>(weight.zero_points) + first, sizeof shorts);
    return floats(__builtin_convertvector(shorts, IntVector));
  }
  return every(static_cast<float>(weight.zero_point));
}

OPTGPTQ_INLINE void store_numbers(FloatVector numbers, float* to) { __builtin_memcpy(to, &numbers, sizeof numbers); }

OPTGPTQ_INLINE void store_numbers(FloatVector numbers, BFloat16* to) {
  const IntVector bits = (IntVector)numbers;
  const IntVector rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  const IntVector narrowed = numbers == numbers ? rounded : IntVector{} + 0x7fc0;
  const ShortVector shorts = __builtin_convertvector(narrowed, ShortVector);
  __builtin_memcpy(to, &shorts, sizeof shorts);
}

OPTGPTQ_INLINE void store_numbers(FloatVector numbers, Half* to) {
#if OPTGPTQ_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)numbers, 0));
#elif OPTGPTQ_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)numbers, 0));
#else
  for (int lane = 0; lane < kLanes; ++lane) narrow(numbers[lane], to + lane);
#endif
}

template <class N>
OPTGPTQ_INLINE void put_rows(FloatVector numbers, N* to, std::int64_t first, std::int64_t num_rows) {
  if (first + kLanes <= num_rows) {
    store_numbers(numbers, to + first);
    return;
  }
  for (int lane = 0; lane < kLanes && first + lane < num_rows; ++lane) narrow(numbers[lane], to + first + lane);
}

// Add the bias to the results of a token and vector of rows, round them, and write those rows that there are.
OPTGPTQ_INLINE void put_results(FloatVector numbers, const ProductOutput& output, std::int64_t token,
                                std::int64_t first, std::int64_t num_rows) {
  if (output.bias != nullptr) {
    const std::int64_t left = num_rows - first;
    if (left > 0) numbers += left >= kLanes ? load_numbers(output.bias + first) : load_some(output.bias + first, left);
  }
  const std::int64_t row = token * output.stride;
  if (output.type == kFloat) {
    put_rows(numbers, static_cast<float*>(output.numbers) + row, first, num_rows);
  } else if (output.type == kBFloat16) {
    put_rows(numbers, static_cast<BFloat16*>(output.numbers) + row, first, num_rows);
  } else {
    put_rows(numbers, static_cast<Half*>(output.numbers) + row, first, num_rows);
  }
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
