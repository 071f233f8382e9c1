// Products with codes as they lie in a page: what `paged_attention_products.hpp` does with numbers, sum for sum, so a row
// has the same bits whether the codes of a tile became floats first or not. Included once by each instruction set.
#pragma once

#include "cache_codes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Sums that fit in the registers beside codes and the bytes that they are taken from.
constexpr int kCodeSums = OPTGPTQ_VECTOR_BYTES == 64 ? 16 : 4;

// Queries are in the order of codes: byte by byte, and of a byte part by part.
template <int kBits, int M, int J>
OPTGPTQ_INLINE void score_code_vectors(
    const float* const* query, const std::uint8_t* rows, std::int64_t head_dim, float* scores) {
  constexpr int planes = static_cast<int>(planes_of(kBits));
  FloatVector sum[M][J] = {};
  for (std::int64_t byte = 0; byte < head_dim / planes; ++byte) {
    for (int plane = 0; plane < planes; ++plane) {
      FloatVector code[J];
      for (int j = 0; j < J; ++j) {
        code[j] = as_floats(codes_at<kBits>(rows + j * kLanes, head_dim, byte, plane, kKeys));
      }
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
template <int kBits, int M>
__attribute__((noinline)) void score_codes(
    const float* const* query, const std::uint8_t* rows, std::int64_t head_dim, std::int64_t begin, std::int64_t end,
    float* scores) {
  constexpr int most = kCodeSums / M < kKeyVectors ? kCodeSums / M : kKeyVectors;
  for (std::int64_t first = begin / most * most; first < end; first += most) {
    score_code_vectors<kBits, M, most>(query, rows + first * kLanes, head_dim, scores + first * kLanes);
  }
}

// Rows of codes of the values of a tile.
struct ValueRows {
  const std::uint8_t* blocks[kBlocks];
  std::int64_t row_bytes, head_dim;
};

// Add keys `begin .. end - 1` by their weights to the features of `F` vectors of bytes from `byte` on.
template <int kBits, int M, int F>
OPTGPTQ_INLINE void add_code_vectors(
    float* const* output, const float* weights, const ValueRows& rows, std::int64_t begin, std::int64_t end,
    std::int64_t byte) {
  constexpr int planes = static_cast<int>(planes_of(kBits));
  const std::int64_t part = rows.head_dim / planes;
  FloatVector sum[M][F][planes];
  for (int m = 0; m < M; ++m) {
    for (int f = 0; f < F; ++f) {
      for (int plane = 0; plane < planes; ++plane) {
        sum[m][f][plane] = load_numbers(output[m] + plane * part + byte + f * kLanes);
      }
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
          const FloatVector code = as_floats(codes_at<kBits>(row, rows.head_dim, f * kLanes, plane, 1));
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

template <int kBits, int M, int F>
OPTGPTQ_INLINE void add_code_blocks(
    float* const* output, const float* weights, const ValueRows& rows, std::int64_t begin, std::int64_t end,
    std::int64_t byte) {
  const std::int64_t part = rows.head_dim / planes_of(kBits);
  for (; byte + F * kLanes <= part; byte += F * kLanes) {
    add_code_vectors<kBits, M, F>(output, weights, rows, begin, end, byte);
  }
  if constexpr (F > 1) add_code_blocks<kBits, M, F / 2>(output, weights, rows, begin, end, byte);
}

// Add the codes of keys `begin .. end - 1` to `M` rows; vectors divide each part of the channels.
template <int kBits, int M>
__attribute__((noinline)) void add_codes(
    float* const* output, const float* weights, const ValueRows& rows, std::int64_t begin, std::int64_t end) {
  constexpr int sums = kSums / M / static_cast<int>(planes_of(kBits));
  constexpr int most = sums < 1 ? 1 : sums < 4 ? sums : 4;
  if (begin < end) add_code_blocks<kBits, M, most>(output, weights, rows, begin, end, 0);
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
