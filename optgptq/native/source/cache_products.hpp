// Products of queries with codes as they lie in a page: what `paged_attention_products.hpp` does with numbers, sum for
// sum, so a row has the same bits whether the codes of a tile became floats first or not. Included once by each
// instruction set.
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

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
