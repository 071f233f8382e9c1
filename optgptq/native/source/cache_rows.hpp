// The rows of an item: the query heads of one key/value head, for some tokens. Included once by each instruction set.
#pragma once

#include "cache_tile.hpp"

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

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
