// Attention of the query heads of one key/value head, for some tokens: codes, then what is exact; tile after tile, with
// the running softmax of `paged_attention_tile.hpp`. Included once by each instruction set.
#pragma once

#include "cache_found.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

enum Part { kCodes, kFirstTokens, kRecent, kParts };

// One query head of one token. Behind the sums of its output lies one vector more: sums of weighted minimums of values.
struct CacheRow {
  Row row;
  const float* in_code_order;  // the query
  float query_sum;
  std::int64_t from[kParts], to[kParts];  // positions that it sees
};

inline std::int64_t row_floats(std::int64_t head_dim) { return 2 * padded_dim(head_dim) + kLanes; }

inline std::size_t cache_bytes(const CacheCall& call, std::int64_t num_rows) {
  const std::int64_t head_dim = call.pages.exact.head_dim;
  const std::int64_t rows = (num_rows * static_cast<std::int64_t>(sizeof(CacheRow)) + 63) / 64 * 64;
  const std::int64_t numbers = kRowsTogether * kKeys + num_rows * row_floats(head_dim);
  return static_cast<std::size_t>(rows + (numbers * 4 + 63) / 64 * 64 + space_bytes(call.pages));
}

inline void set_parts(const CacheCall& call, std::int64_t first_exact, CacheRow& row) {
  const std::int64_t position = row.row.position, window = call.rule.window, sinks = call.num_sinks;
  const std::int64_t first = window > 0 && position >= window ? position - window + 1 : 0;
  const bool all_exact = first_exact <= sinks;
  const std::int64_t begins[kParts] = {sinks, 0, all_exact ? 0 : first_exact};
  const std::int64_t ends[kParts] = {all_exact ? 0 : first_exact, all_exact ? 0 : sinks, position + 1};
  for (int part = 0; part < kParts; ++part) {
    row.to[part] = ends[part] < position + 1 ? ends[part] : position + 1;
    row.from[part] = begins[part] > first ? begins[part] : first;
    if (row.from[part] > row.to[part]) row.from[part] = row.to[part];
  }
}

// Channels in the order in which codes of keys are read.
inline void order_query(const CacheSide& side, std::int64_t head_dim, const float* query, float* to, CacheRow& row) {
  const std::int64_t planes = side.bits == kExactBits ? 1 : planes_of(side.bits), part = head_dim / planes;
  row.in_code_order = to;
  row.query_sum = 0.0f;
  for (std::int64_t byte = 0; byte < part; ++byte) {
    for (std::int64_t plane = 0; plane < planes; ++plane) *to++ = query[plane * part + byte];
  }
  for (std::int64_t channel = 0; channel < head_dim; ++channel) row.query_sum += query[channel];
}

inline void begin_cache_rows(const CacheCall& call, const PagedItem& item, CacheRow* rows, float* sums) {
  const std::int64_t head_dim = call.pages.exact.head_dim, padded = padded_dim(head_dim);
  const std::int64_t group_size = call.num_heads / call.pages.exact.num_kv_heads;
  const std::int64_t start = call.sequences.query_start[item.sequence];
  const std::int64_t num_new = call.sequences.query_start[item.sequence + 1] - start;
  const std::int64_t before = call.sequences.context[item.sequence] - num_new;
  for (std::int64_t index = item.first; index < item.first + item.num_tokens; ++index) {
    for (std::int64_t member = 0; member < group_size; ++member, ++rows, sums += row_floats(head_dim)) {
      const std::int64_t head = item.kv_head * group_size + member;
      Row& row = rows->row;
      row.query = call.query + (start + index) * call.token_stride + head * call.head_stride;
      row.output = sums;
      row.position = before + index;
      row.slope = call.rule.slopes == nullptr ? 0.0f : call.rule.slopes[head];
      row.largest = -__builtin_inff();
      row.total = FloatVector{};
      if (call.rule.sinks != nullptr) {
        // A learned sink is a key at position 0, without a value.
        const float bias = bias_of(call.rule, row, FloatVector{})[0] * static_cast<float>(call.rule.alibi_scale);
        row.largest = call.rule.sinks[head] + bias;
        row.total[0] = 1.0f;
      }
      for (std::int64_t feature = 0; feature < padded + kLanes; ++feature) sums[feature] = 0.0f;
      order_query(call.pages.keys, head_dim, row.query, sums + padded + kLanes, *rows);
      set_parts(call, call.first_exact[start + index], *rows);
    }
  }
}

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
__attribute__((noinline)) void scale_weights(const CacheTile& tile, CacheRow& row, std::int64_t padded, float* weights) {
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

inline void write_cache_rows(const CacheCall& call, const PagedItem& item, const CacheRow* rows) {
  const std::int64_t head_dim = call.pages.exact.head_dim, padded = padded_dim(head_dim);
  const std::int64_t group_size = call.num_heads / call.pages.exact.num_kv_heads;
  const std::int64_t start = call.sequences.query_start[item.sequence] + item.first;
  for (std::int64_t token = 0; token < item.num_tokens; ++token) {
    float* to = call.output + ((start + token) * call.num_heads + item.kv_head * group_size) * head_dim;
    for (std::int64_t member = 0; member < group_size; ++member, ++rows, to += head_dim) {
      const float total = sum_of_lanes(rows->row.total);
      const float minimums = sum_of_lanes(load_numbers(rows->row.output + padded));
      for (std::int64_t feature = 0; feature < head_dim; ++feature) {
        to[feature] = (rows->row.output[feature] + minimums) / total;
      }
    }
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
