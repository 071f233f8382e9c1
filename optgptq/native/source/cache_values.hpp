// Codes of values, as they lie in a page, added to outputs by their weights; sum for sum what is done with numbers.
// Included once by each instruction set.
#pragma once

#include "cache_products.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Rows of codes of the values of a tile.
struct ValueRows {
  const std::uint8_t* blocks[kBlocks];
  std::int64_t row_bytes, head_dim;
  const std::int32_t* shifts;  // of each channel's code in its byte; behind them those of third bits
  GroupPairs pairs;            // vectors divide its groups
};

// Codes of a value as its numbers; `scale` is that of their group.
template <bool kGrouped>
OPTGPTQ_INLINE FloatVector as_values(FloatVector codes, const float* scale, std::int64_t to_minimums) {
  if constexpr (!kGrouped) return codes;
  return multiply_add(codes, every(*scale), every(scale[to_minimums]));
}

inline std::int64_t lower_part(std::int64_t bits, std::int64_t head_dim) {
  return head_dim / (bits == 3 ? 4 : planes_of(bits));
}

// Whether a vector of channels is whole vectors of bytes, or the same few bytes over and over.
inline bool fits_vectors(std::int64_t part) { return part % kLanes == 0 || (kLanes % part == 0 && part >= 4); }

inline bool has_fused_values(std::int64_t bits, std::int64_t head_dim) {
  const bool lower = head_dim % kLanes == 0 && fits_vectors(lower_part(bits, head_dim));
  return lower && (bits != 3 || fits_vectors(head_dim / 8));
}

inline void set_shifts(std::int64_t bits, std::int64_t head_dim, std::int32_t* shifts) {
  const std::int64_t part = lower_part(bits, head_dim);
  for (std::int64_t first = 0, shift = 0; first < head_dim; first += part, shift += bits == 3 ? 2 : bits) {
    for (std::int64_t index = 0; index < part; ++index) shifts[first + index] = static_cast<std::int32_t>(shift);
  }
  if (bits != 3) return;
  for (std::int64_t first = 0, shift = 0; first < head_dim; first += head_dim / 8, ++shift) {
    for (std::int64_t index = 0; index < head_dim / 8; ++index) {
      shifts[head_dim + first + index] = static_cast<std::int32_t>(shift);
    }
  }
}

// Add keys `begin .. end - 1` by their weights to the features of `F` vectors of bytes from `byte` on.
template <int kBits, int M, int F, bool kGrouped>
OPTGPTQ_INLINE void add_code_vectors(
    float* const* output, const float* weights, const ValueRows& rows, std::int64_t begin, std::int64_t end,
    std::int64_t byte) {
  constexpr int planes = static_cast<int>(planes_of(kBits));
  const std::int64_t part = rows.head_dim / planes;
  FloatVector sum[M][F][planes];
  const float* scale[F][planes] = {};
  for (int f = 0; f < F; ++f) {
    for (int plane = 0; plane < planes; ++plane) {
      const std::int64_t channel = plane * part + byte + f * kLanes;
      for (int m = 0; m < M; ++m) sum[m][f][plane] = load_numbers(output[m] + channel);
      if constexpr (kGrouped) scale[f][plane] = rows.pairs.scale + channel / rows.pairs.group_size * kKeys;
    }
  }
  for (std::int64_t key = begin; key < end;) {
    const std::uint8_t* row = rows.blocks[key / kBlockKeys] + key % kBlockKeys * rows.row_bytes + byte;
    const std::int64_t block_end = (key / kBlockKeys + 1) * kBlockKeys, stop = block_end < end ? block_end : end;
    for (; key < stop; ++key, row += rows.row_bytes) {
      FloatVector weight[M];
      for (int m = 0; m < M; ++m) weight[m] = every(weights[m * kKeys + key]);
      for (int f = 0; f < F; ++f) {
        for (int plane = 0; plane < planes; ++plane) {
          const FloatVector code = as_values<kGrouped>(
              as_floats(codes_at<kBits>(row, rows.head_dim, f * kLanes, plane, 1)), scale[f][plane] + key,
              rows.pairs.to_minimums);
          for (int m = 0; m < M; ++m) sum[m][f][plane] = multiply_add(weight[m], code, sum[m][f][plane]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int f = 0; f < F; ++f) {
      for (int plane = 0; plane < planes; ++plane) {
        float* to = output[m] + plane * part + byte + f * kLanes;
        __builtin_memcpy(to, &sum[m][f][plane], sizeof(FloatVector));
      }
    }
  }
}

template <int kBits, int M, int F, bool kGrouped>
OPTGPTQ_INLINE void add_code_blocks(
    float* const* output, const float* weights, const ValueRows& rows, std::int64_t begin, std::int64_t end,
    std::int64_t byte) {
  const std::int64_t part = rows.head_dim / planes_of(kBits);
  for (; byte + F * kLanes <= part; byte += F * kLanes) {
    add_code_vectors<kBits, M, F, kGrouped>(output, weights, rows, begin, end, byte);
  }
  if constexpr (F > 1) add_code_blocks<kBits, M, F / 2, kGrouped>(output, weights, rows, begin, end, byte);
}

// The bytes of the channels of one vector, of which `part` lie side by side.
OPTGPTQ_INLINE IntVector repeated_bytes(const std::uint8_t* from, std::int64_t part) {
#if OPTGPTQ_VECTOR_BYTES == 64
  if (part == 8) {
    std::int64_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return (IntVector)_mm512_cvtepu8_epi32(_mm_set1_epi64x(bytes));
  }
#endif
#if OPTGPTQ_VECTOR_BYTES > 16
  if (part == 4) {
    std::int32_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    const __m128i repeated = _mm_set1_epi32(bytes);
#if OPTGPTQ_VECTOR_BYTES == 64
    return (IntVector)_mm512_cvtepu8_epi32(repeated);
#else
    return (IntVector)_mm256_cvtepu8_epi32(repeated);
#endif
  }
#endif
  (void)part;
  return load_bytes(from);
}

inline std::int64_t place_in_part(std::int64_t channel, std::int64_t part) {
  if (part < kLanes) return 0;
  while (channel >= part) channel -= part;
  return channel;
}

// Like `add_code_vectors`, for `F` vectors of channels from `channel` on, each shifted by its own number of bits.
template <int kBits, int M, int F, bool kGrouped>
OPTGPTQ_INLINE void add_shifted_vectors(
    float* const* output, const float* weights, const ValueRows& rows, std::int64_t begin, std::int64_t end,
    std::int64_t channel) {
  const std::int64_t part = lower_part(kBits, rows.head_dim), upper_part = rows.head_dim / 8;
  FloatVector sum[M][F];
  IntVector shift[F], upper_shift[F];
  const float* scale[F] = {};
  std::int64_t place[F], upper_place[F];
  for (int f = 0; f < F; ++f) {
    const std::int64_t first = channel + f * kLanes;
    for (int m = 0; m < M; ++m) sum[m][f] = load_numbers(output[m] + first);
    __builtin_memcpy(shift + f, rows.shifts + first, sizeof(IntVector));
    place[f] = place_in_part(first, part);
    if constexpr (kGrouped) scale[f] = rows.pairs.scale + first / rows.pairs.group_size * kKeys;
    if constexpr (kBits == 3) {
      __builtin_memcpy(upper_shift + f, rows.shifts + rows.head_dim + first, sizeof(IntVector));
      upper_place[f] = third_bits(rows.head_dim) + place_in_part(first, upper_part);
    }
  }
  for (std::int64_t key = begin; key < end; ++key) {
    const std::uint8_t* row = rows.blocks[key / kBlockKeys] + key % kBlockKeys * rows.row_bytes;
    for (int f = 0; f < F; ++f) {
      IntVector code = (repeated_bytes(row + place[f], part) >> shift[f]) & (kBits == 3 ? 3 : (1 << kBits) - 1);
      if constexpr (kBits == 3) {
        code |= ((repeated_bytes(row + upper_place[f], upper_part) >> upper_shift[f]) & 1) << 2;
      }
      const FloatVector number = as_values<kGrouped>(as_floats(code), scale[f] + key, rows.pairs.to_minimums);
      for (int m = 0; m < M; ++m) sum[m][f] = multiply_add(every(weights[m * kKeys + key]), number, sum[m][f]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int f = 0; f < F; ++f) __builtin_memcpy(output[m] + channel + f * kLanes, &sum[m][f], sizeof(FloatVector));
  }
}

template <int kBits, int M, int F, bool kGrouped>
OPTGPTQ_INLINE void add_shifted_blocks(
    float* const* output, const float* weights, const ValueRows& rows, std::int64_t begin, std::int64_t end,
    std::int64_t channel) {
  for (; channel + F * kLanes <= rows.head_dim; channel += F * kLanes) {
    add_shifted_vectors<kBits, M, F, kGrouped>(output, weights, rows, begin, end, channel);
  }
  if constexpr (F > 1) add_shifted_blocks<kBits, M, F / 2, kGrouped>(output, weights, rows, begin, end, channel);
}

// Add the codes of keys `begin .. end - 1` to `M` rows, where `has_fused_values`.
template <int kBits, int M, bool kGrouped>
__attribute__((noinline)) void add_codes(
    float* const* output, const float* weights, const ValueRows& rows, std::int64_t begin, std::int64_t end) {
  if (begin >= end) return;
  if constexpr (kBits != 3) {
    constexpr int sums = kSums / M / static_cast<int>(planes_of(kBits));
    constexpr int most = sums < 1 ? 1 : sums < 4 ? sums : 4;
    if (lower_part(kBits, rows.head_dim) % kLanes == 0) {
      return add_code_blocks<kBits, M, most, kGrouped>(output, weights, rows, begin, end, 0);
    }
  }
  constexpr int most = kSums / M < 4 ? kSums / M : 4;
  add_shifted_blocks<kBits, M, most, kGrouped>(output, weights, rows, begin, end, 0);
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
