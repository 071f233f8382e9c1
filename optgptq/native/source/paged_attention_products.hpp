// Products of some rows with the keys and values of a tile; a row is one query head of one token.
// Each score and each feature is one chain of sums, key after key, whatever other rows are worked on beside it.
// Included once by each instruction set.
#pragma once

#include "paged_attention_numbers.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Keys of a tile; tiles begin at multiples of it, so they are the same for every query.
constexpr std::int64_t kKeys = 64;
constexpr std::int64_t kKeyVectors = kKeys / kLanes;
// Sums that fit in the registers beside their factors.
constexpr int kSums = OPTGPTQ_VECTOR_BYTES == 64 ? 16 : 8;

// Where the keys and values of one tile lie.
template <class N>
struct TileNumbers {
  const N* keys[kKeyVectors];  // of each vector of keys
  const N* values;             // of the pool, at the key/value head
  const std::int32_t* table;   // pages, from the one with the tile's first key on
  std::int64_t offset;         // of the tile's first key in that page
  std::int64_t page_size, head_dim, page_stride;
  // Processors do not read ahead across pages of memory, so with every key its place among the values is asked for, and
  // with every value its place among the keys of the next tile: 1.5 to 2 times as fast where memory is the limit.
  const N* pool_keys;  // at the key/value head
  std::int64_t ahead;  // pages from one tile to the next
  std::int64_t last;   // of the sequence's pages, counted from `table` on
};

template <class N, int M, int J>
OPTGPTQ_INLINE void score_vectors(
    const float* const* query, const N* const* keys, const TileNumbers<N>& tile, float* scores) {
  FloatVector sum[M][J] = {};
  const N* place[J];
  for (int j = 0; j < J; ++j) place[j] = keys[j];
  for (std::int64_t feature = 0; feature < tile.head_dim; ++feature) {
    FloatVector key[J];
    for (int j = 0; j < J; ++j) {
      key[j] = load_numbers(place[j] + feature * tile.page_size);
      __builtin_prefetch(tile.values + (place[j] - tile.pool_keys) + feature * tile.page_size, 0, 2);
    }
    for (int m = 0; m < M; ++m) {
      const FloatVector factor = every(query[m][feature]);
      for (int j = 0; j < J; ++j) sum[m][j] = multiply_add(factor, key[j], sum[m][j]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < J; ++j) __builtin_memcpy(scores + m * kKeys + j * kLanes, &sum[m][j], sizeof(FloatVector));
  }
}

// Products of `M` queries with vectors `begin .. end - 1` of keys, and perhaps some more of no meaning.
template <class N, int M>
__attribute__((noinline)) void score(
    const float* const* query, const TileNumbers<N>& tile, std::int64_t begin, std::int64_t end, float* scores) {
  constexpr int most = kSums / M < kKeyVectors ? kSums / M : kKeyVectors;
  for (std::int64_t first = begin / most * most; first < end; first += most) {
    const N* keys[most];
    for (int j = 0; j < most; ++j) {
      const std::int64_t vector = first + j;
      keys[j] = tile.keys[vector < begin ? begin : vector < end ? vector : end - 1];
    }
    score_vectors<N, M, most>(query, keys, tile, scores + first * kLanes);
  }
}

// Add keys `begin .. end - 1`, by their weights, to `F` vectors of features from `feature` on.
template <class N, int M, int F, bool kWhole>
OPTGPTQ_INLINE void add_vectors(
    float* const* output, const float* weights, const TileNumbers<N>& tile, std::int64_t begin, std::int64_t end,
    std::int64_t feature) {
  FloatVector sum[M][F];
  for (int m = 0; m < M; ++m) {
    for (int f = 0; f < F; ++f) sum[m][f] = load_numbers(output[m] + feature + f * kLanes);
  }
  std::int64_t page = (tile.offset + begin) / tile.page_size;
  std::int64_t place = (tile.offset + begin) % tile.page_size;
  for (std::int64_t key = begin; key < end; ++page, place = 0) {
    const N* value = tile.values + tile.table[page] * tile.page_stride + place * tile.head_dim + feature;
    const std::int64_t next_page = page + tile.ahead < tile.last ? page + tile.ahead : tile.last;
    const N* next = tile.pool_keys + tile.table[next_page] * tile.page_stride + place * tile.head_dim + feature;
    const std::int64_t in_page = key + tile.page_size - place, stop = in_page < end ? in_page : end;
    for (; key < stop; ++key, value += tile.head_dim, next += tile.head_dim) {
      FloatVector number[F];
      for (int f = 0; f < F; ++f) {
        __builtin_prefetch(next + f * kLanes, 0, 2);
        number[f] = kWhole ? load_numbers(value + f * kLanes) : load_some(value, tile.head_dim - feature);
      }
      for (int m = 0; m < M; ++m) {
        const FloatVector weight = every(weights[m * kKeys + key]);
        for (int f = 0; f < F; ++f) sum[m][f] = multiply_add(weight, number[f], sum[m][f]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int f = 0; f < F; ++f) __builtin_memcpy(output[m] + feature + f * kLanes, &sum[m][f], sizeof(FloatVector));
  }
}

// Features from `feature` on in blocks of `F` vectors, then in ever smaller ones.
template <class N, int M, int F>
OPTGPTQ_INLINE void add_blocks(
    float* const* output, const float* weights, const TileNumbers<N>& tile, std::int64_t begin, std::int64_t end,
    std::int64_t feature) {
  for (; feature + F * kLanes <= tile.head_dim; feature += F * kLanes) {
    add_vectors<N, M, F, true>(output, weights, tile, begin, end, feature);
  }
  if constexpr (F > 1) {
    add_blocks<N, M, F / 2>(output, weights, tile, begin, end, feature);
  } else if (feature < tile.head_dim) {
    add_vectors<N, M, 1, false>(output, weights, tile, begin, end, feature);
  }
}

// Add the values of keys `begin .. end - 1` to `M` rows.
template <class N, int M>
__attribute__((noinline)) void add_values(
    float* const* output, const float* weights, const TileNumbers<N>& tile, std::int64_t begin, std::int64_t end) {
  constexpr int most = kSums / M < 8 ? kSums / M : 8;
  if (begin < end) add_blocks<N, M, most>(output, weights, tile, begin, end, 0);
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
