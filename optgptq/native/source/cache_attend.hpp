// Attention of some rows: codes, then what is exact; tile after tile, with the running softmax of
// `paged_attention_tile.hpp`. Included once by each instruction set.
#pragma once

#include "cache_found.hpp"
#include "cache_rows.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

template <int kBits, int M>
void score_keys(
    const KeyRows& rows, const float* const* query, std::int64_t begin, std::int64_t end, float* scores) {
  if (rows.pairs.scale == nullptr) return score_codes<kBits, M, false>(query, rows, begin, end, scores);
  score_codes<kBits, M, true>(query, rows, begin, end, scores);
}

template <int M>
void score_tile(
    const CacheSide& side, const CacheTile& tile, const float* const* query, std::int64_t begin, std::int64_t end,
    float* scores) {
  const KeyRows& rows = tile.key_codes;
  if (rows.bytes == nullptr) return score<float, M>(query, tile.numbers, begin, end, scores);
  switch (side.bits) {
    case 8: return score_keys<8, M>(rows, query, begin, end, scores);
    case 4: return score_keys<4, M>(rows, query, begin, end, scores);
    case 3: return score_keys<3, M>(rows, query, begin, end, scores);
    default: return score_keys<2, M>(rows, query, begin, end, scores);
  }
}

template <int kBits, int M>
void add_rows(
    const ValueRows& rows, float* const* output, const float* weights, std::int64_t begin, std::int64_t end) {
  if (rows.pairs.scale == nullptr) return add_codes<kBits, M, false>(output, weights, rows, begin, end);
  add_codes<kBits, M, true>(output, weights, rows, begin, end);
}

template <int M>
void add_tile(
    const CacheSide& side, const CacheTile& tile, float* const* output, const float* weights, std::int64_t begin,
    std::int64_t end) {
  const ValueRows& rows = tile.value_codes;
  if (rows.blocks[0] == nullptr) return add_values<float, M>(output, weights, tile.numbers, begin, end);
  switch (side.bits) {
    case 8: return add_rows<8, M>(rows, output, weights, begin, end);
    case 4: return add_rows<4, M>(rows, output, weights, begin, end);
    case 3: return add_rows<3, M>(rows, output, weights, begin, end);
    default: return add_rows<2, M>(rows, output, weights, begin, end);
  }
}

// From products with codes to products with keys.
__attribute__((noinline)) void scale_products(const CacheTile& tile, const CacheRow& row, float* scores) {
  for (std::int64_t key = row.row.begin / kLanes * kLanes; key < row.row.end; key += kLanes) {
    const FloatVector minimum = load_numbers(tile.key_minimum + key) * row.query_sum;
    const FloatVector score = multiply_add(load_numbers(tile.key_scale + key), load_numbers(scores + key), minimum);
    __builtin_memcpy(scores + key, &score, sizeof score);
  }
}

// From weights of values to weights of codes; what minimums add to every feature is summed apart.
__attribute__((noinline)) void scale_weights(
    const CacheTile& tile, CacheRow& row, std::int64_t padded, float* weights) {
  const auto seen_begin = static_cast<std::int32_t>(row.row.begin), seen_end = static_cast<std::int32_t>(row.row.end);
  IntVector lane;
  for (int index = 0; index < kLanes; ++index) lane[index] = index;
  FloatVector sum = load_numbers(row.row.output + padded);
  for (std::int64_t key = row.row.begin / kLanes * kLanes; key < row.row.end; key += kLanes) {
    const IntVector place = lane + static_cast<std::int32_t>(key);
    FloatVector weight = load_numbers(weights + key);
    // Parameters of keys that are not seen may be anything.
    const FloatVector minimum = load_numbers(tile.value_minimum + key);
    const FloatVector seen = (place >= seen_begin) & (place < seen_end) ? minimum : FloatVector{};
    sum = multiply_add(weight, seen, sum);
    weight *= load_numbers(tile.value_scale + key);
    __builtin_memcpy(weights + key, &weight, sizeof weight);
  }
  __builtin_memcpy(row.row.output + padded, &sum, sizeof sum);
}

// `M` rows in one tile, as `attend_rows` does it: what some of them see alone is added to each alone.
template <int M>
void attend_cache_rows(
    const CacheCall& call, const CacheTile& tile, CacheRow* rows, Part part, std::int64_t first_key, float* weights) {
  std::int64_t first = kKeys, last = 0, shared_begin = 0, shared_end = kKeys;
  const float* query[M];
  float* output[M];
  for (int m = 0; m < M; ++m) {
    const Row& row = rows[m].row;
    query[m] = part == kCodes ? rows[m].in_code_order : row.query;
    output[m] = row.output;
    shared_begin = row.begin > shared_begin ? row.begin : shared_begin;
    shared_end = row.end < shared_end ? row.end : shared_end;
    if (row.begin == row.end) continue;
    first = row.begin < first ? row.begin : first;
    last = row.end > last ? row.end : last;
  }
  if (first >= last) return;
  const std::int64_t padded = padded_dim(tile.numbers.head_dim);
  score_tile<M>(call.pages.keys, tile, query, first / kLanes, (last + kLanes - 1) / kLanes, weights);
  for (int m = 0; m < M; ++m) {
    if (rows[m].row.begin == rows[m].row.end) continue;
    if (tile.key_scale != nullptr) scale_products(tile, rows[m], weights + m * kKeys);
    weigh(call.rule, rows[m].row, first_key, padded + kLanes, weights + m * kKeys);
    if (tile.value_scale != nullptr) scale_weights(tile, rows[m], padded, weights + m * kKeys);
  }
  if (shared_begin >= shared_end) shared_begin = shared_end = kKeys;
  const CacheSide& side = call.pages.values;
  for (int m = 0; M > 1 && m < M; ++m) {
    const Row& row = rows[m].row;
    const std::int64_t stop = row.end < shared_begin ? row.end : shared_begin;
    add_tile<1>(side, tile, output + m, weights + m * kKeys, row.begin, stop);
  }
  add_tile<M>(side, tile, output, weights, shared_begin, shared_end);
  for (int m = 0; M > 1 && m < M; ++m) {
    add_tile<1>(side, tile, output + m, weights + m * kKeys, shared_end, rows[m].row.end);
  }
}

inline void attend_cache_tile(
    const CacheCall& call, const CacheTile& tile, CacheRow* rows, std::int64_t num_rows, Part part,
    std::int64_t first_key, float* weights) {
  std::int64_t row = 0;
  for (; row + 4 <= num_rows; row += 4) attend_cache_rows<4>(call, tile, rows + row, part, first_key, weights);
  if (row + 2 <= num_rows) {
    attend_cache_rows<2>(call, tile, rows + row, part, first_key, weights);
    row += 2;
  }
  if (row < num_rows) attend_cache_rows<1>(call, tile, rows + row, part, first_key, weights);
}

// Set what each row sees of a part in the tile at `place`, and what any of them does.
inline void look_at_cache_tile(CacheRow* rows, std::int64_t num_rows, Part part, TilePlace& place) {
  place.begin = kKeys;
  place.end = 0;
  for (std::int64_t index = 0; index < num_rows; ++index) {
    Row& row = rows[index].row;
    const std::int64_t begin = rows[index].from[part] - place.first_key, end = rows[index].to[part] - place.first_key;
    row.end = end < 0 ? 0 : end < kKeys ? end : kKeys;
    row.begin = begin < 0 ? 0 : begin < row.end ? begin : row.end;
    if (row.begin == row.end) continue;
    place.begin = row.begin < place.begin ? row.begin : place.begin;
    place.end = row.end > place.end ? row.end : place.end;
  }
}

inline void attend_part(
    const CacheCall& call, const PagedItem& item, CacheRow* rows, std::int64_t num_rows, Part part,
    const TileSpace& space, float* weights) {
  std::int64_t first = INT64_MAX, last = 0;
  for (std::int64_t index = 0; index < num_rows; ++index) {
    const CacheRow& row = rows[index];
    if (row.from[part] == row.to[part]) continue;
    first = row.from[part] < first ? row.from[part] : first;
    last = row.to[part] > last ? row.to[part] : last;
  }
  const std::int64_t start = call.sequences.query_start[item.sequence];
  const std::int64_t num_new = call.sequences.query_start[item.sequence + 1] - start;
  TilePlace place = {item.kv_head, item.sequence, first / kKeys * kKeys, 0, 0};
  for (; place.first_key < last; place.first_key += kKeys) {
    look_at_cache_tile(rows, num_rows, part, place);
    if (place.begin >= place.end) continue;
    const CacheTile tile =
        part == kCodes
            ? code_tile(call, place, last - place.first_key, space, num_rows)
            : exact_tile(call, place, call.sequences.context[item.sequence] - num_new, start, space);
    attend_cache_tile(call, tile, rows, num_rows, part, place.first_key, weights);
  }
}

inline void attend_cache(const CacheCall& call, const PagedItem& item, void* scratch) {
  const std::int64_t num_rows = item.num_tokens * (call.num_heads / call.pages.exact.num_kv_heads);
  auto* rows = static_cast<CacheRow*>(scratch);
  const std::int64_t of_rows = (num_rows * static_cast<std::int64_t>(sizeof(CacheRow)) + 63) / 64 * 64;
  auto* weights = reinterpret_cast<float*>(static_cast<char*>(scratch) + of_rows);
  float* sums = weights + kRowsTogether * kKeys;
  const std::int64_t numbers = kRowsTogether * kKeys + num_rows * row_floats(call.pages.exact.head_dim);
  char* rest = reinterpret_cast<char*>(weights) + (numbers * 4 + 63) / 64 * 64;
  const TileSpace space = lay_out(call.pages, rest);
  begin_cache_rows(call, item, rows, sums);
  for (int part = 0; part < kParts; ++part) {
    attend_part(call, item, rows, num_rows, static_cast<Part>(part), space, weights);
  }
  write_cache_rows(call, item, rows);
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
