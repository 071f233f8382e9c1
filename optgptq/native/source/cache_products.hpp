// Products with codes as they lie in a page: what `paged_attention_products.hpp` does with numbers, sum for sum, so a row
// has the same bits whether the codes of a tile became floats first or not. Included once by each instruction set.
#pragma once

#include "cache_codes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Sums that fit in the registers beside codes and the bytes that they are taken from.
constexpr int kCodeSums = OPTGPTQ_VECTOR_BYTES == 64 ? 16 : 4;

// Scales `[groups, 64]` of a tile with more than one group along the channels, minimums so many numbers behind.
struct GroupPairs {
  const float* scale;  // null: codes stand for themselves
  std::int64_t to_minimums, group_size;
};

// Turned rows of codes of the keys of a tile.
struct KeyRows {
  const std::uint8_t* bytes;
  std::int64_t head_dim;
  GroupPairs pairs;
};

// Where the pairs of the channels of each part lie while they are gone through together.
template <int kPlanes>
struct PairWalk {
  const float* scale[kPlanes];
  std::int64_t left[kPlanes];

  OPTGPTQ_INLINE PairWalk(const KeyRows& rows, const float* first) {
    for (int plane = 0; plane < kPlanes; ++plane) {
      const std::int64_t channel = plane * (rows.head_dim / kPlanes), size = rows.pairs.group_size;
      scale[plane] = first + channel / size * kKeys;
      left[plane] = size - channel % size;
    }
  }

  OPTGPTQ_INLINE void step(int plane, std::int64_t group_size) {
    if (--left[plane] > 0) return;
    left[plane] = group_size;
    scale[plane] += kKeys;
  }
};

// Queries are in the order of codes: byte by byte, and of a byte part by part.
template <int kBits, int M, int J, bool kGrouped>
OPTGPTQ_INLINE void score_code_vectors(
    const float* const* query, const KeyRows& rows, std::int64_t first_key, float* scores) {
  constexpr int planes = static_cast<int>(planes_of(kBits));
  const std::int64_t head_dim = rows.head_dim;
  PairWalk<kGrouped ? planes : 1> walk(rows, rows.pairs.scale + first_key);
  FloatVector sum[M][J] = {};
  for (std::int64_t byte = 0; byte < head_dim / planes; ++byte) {
#pragma GCC unroll 8
    for (int plane = 0; plane < planes; ++plane) {
      FloatVector code[J];
      for (int j = 0; j < J; ++j) {
        code[j] = as_floats(codes_at<kBits>(rows.bytes + first_key + j * kLanes, head_dim, byte, plane, kKeys));
        if constexpr (kGrouped) {
          const float* scale = walk.scale[plane] + j * kLanes;
          code[j] = multiply_add(code[j], load_numbers(scale), load_numbers(scale + rows.pairs.to_minimums));
        }
      }
      if constexpr (kGrouped) walk.step(plane, rows.pairs.group_size);
      for (int m = 0; m < M; ++m) {
        const FloatVector factor = every(query[m][byte * planes + plane]);
        for (int j = 0; j < J; ++j) sum[m][j] = multiply_add(factor, code[j], sum[m][j]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < J; ++j) __builtin_memcpy(scores + m * kKeys + j * kLanes, &sum[m][j], sizeof(FloatVector));
  }
}

// Products of `M` queries with vectors `begin .. end - 1` of a tile's codes, and perhaps some more of no meaning.
template <int kBits, int M, bool kGrouped>
__attribute__((noinline)) void score_codes(
    const float* const* query, const KeyRows& rows, std::int64_t begin, std::int64_t end, float* scores) {
  constexpr int most = kCodeSums / M < kKeyVectors ? kCodeSums / M : kKeyVectors;
  for (std::int64_t first = begin / most * most; first < end; first += most) {
    score_code_vectors<kBits, M, most, kGrouped>(query, rows, first * kLanes, scores + first * kLanes);
  }
}

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
