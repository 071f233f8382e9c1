// New tokens to pages of codes. Included once by each instruction set.
#pragma once

#include "cache_exact.hpp"
#include "cache_fit.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Work space of one side of one head: what belongs to the metric, and two fits.
struct StoreSpace {
  float* diagonal;
  float* ones;
  float* block_sums;
  float* image;
  Fit best, trial;
};

inline std::int64_t store_floats(std::int64_t head_dim) { return 14 * padded_size(head_dim); }

inline StoreSpace lay_out_store(void* scratch, std::int64_t head_dim) {
  const std::int64_t size = padded_size(head_dim);
  auto* next = static_cast<float*>(scratch);
  const auto take = [&] {
    float* taken = next;
    next += size;
    return taken;
  };
  StoreSpace space;
  space.diagonal = take();
  space.ones = take();
  space.block_sums = take();
  space.image = take();
  Fit* const fits[] = {&space.best, &space.trial};
  for (Fit* fit : fits) {
    fit->code = take();
    fit->gradient = take();
    fit->error = take();
    fit->ranges = reinterpret_cast<Range*>(take());
    take();  // A range is two numbers.
  }
  return space;
}

inline Metric metric_of(const CacheSide& side, std::int64_t head_dim, std::int64_t kv_head, StoreSpace& space) {
  Metric metric = {};
  metric.head_dim = head_dim;
  metric.group_size = side.group_size;
  metric.limit = limit_of(side);
  if (side.metric == nullptr) return metric;
  metric.rows = side.metric + kv_head * head_dim * head_dim;
  metric.feedback = side.feedback + kv_head * head_dim * head_dim;
  for (std::int64_t channel = 0; channel < head_dim; ++channel) {
    space.diagonal[channel] = metric.rows[channel * head_dim + channel];
    space.ones[channel] = 1.0f;
  }
  for (std::int64_t group = 0; group < head_dim / side.group_size; ++group) {
    const std::int64_t first = group * side.group_size;
    const float* block = metric.rows + first * head_dim + first;
    sum_rows(space.image, block, head_dim, space.ones, side.group_size, side.group_size);
    space.block_sums[group] = dot(space.ones, space.image, side.group_size);
  }
  metric.diagonal = space.diagonal;
  metric.ones = space.ones;
  metric.block_sums = space.block_sums;
  return metric;
}

// Codes, scales and minimums of one vector, in `space.best`.
inline void encode_vector(const CacheSide& side, const Metric& metric, const float* x, StoreSpace& space) {
  const std::int64_t size = side.group_size;
  for (std::int64_t group = 0; group < metric.head_dim / size; ++group) {
    const float* weight = metric.rows == nullptr ? nullptr : metric.diagonal + group * size;
    space.best.ranges[group] = choose_range(side, x + group * size, weight, size);
    if (metric.rows != nullptr) continue;
    encode_group(side, x + group * size, size, space.best.ranges[group], space.best.code + group * size);
  }
  if (metric.rows != nullptr) fit_codes(metric, x, space.best, space.trial, space.image);
}

template <class N>
OPTGPTQ_INLINE void write_numbers(const float* x, std::int64_t head_dim, std::uint8_t* row) {
  for (std::int64_t channel = 0; channel < head_dim; ++channel) {
    N number;
    narrow(x[channel], &number);
    __builtin_memcpy(row + channel * static_cast<std::int64_t>(sizeof(N)), &number, sizeof number);
  }
}

inline void write_raw(const CachePages& pages, const float* x, std::uint8_t* row) {
  const std::int64_t head_dim = pages.exact.head_dim;
  switch (pages.type) {
    case NumberType::kFloat: return write_numbers<float>(x, head_dim, row);
    case NumberType::kBFloat16: return write_numbers<BFloat16>(x, head_dim, row);
    case NumberType::kHalf: return write_numbers<Half>(x, head_dim, row);
  }
}

struct NewVectors {
  const float* first;
  std::int64_t token_stride, head_stride;
};

inline NewVectors new_vectors(const NewTokens& tokens, bool is_key) {
  if (is_key) return {tokens.key, tokens.key_token_stride, tokens.key_head_stride};
  return {tokens.value, tokens.value_token_stride, tokens.value_head_stride};
}

inline void store_side(const CacheStoreCall& call, const CacheStoreItem& item, bool is_key, void* scratch) {
  const CachePages& pages = call.pages;
  const CacheSide& side = is_key ? pages.keys : pages.values;
  if (side.along_tokens != 0) return;
  const std::int64_t head_dim = pages.exact.head_dim, page_size = pages.exact.page_size;
  const NewVectors vectors = new_vectors(call.tokens, is_key);
  StoreSpace space = lay_out_store(scratch, head_dim);
  const Metric metric = side.bits == kExactBits ? Metric{} : metric_of(side, head_dim, item.kv_head, space);
  for (std::int64_t token = item.first; token < item.first + item.num_tokens; ++token) {
    const float* x = vectors.first + token * vectors.token_stride + item.kv_head * vectors.head_stride;
    const std::int64_t slot = call.slot[token] % page_size;
    std::uint8_t* page = pages.bytes + call.slot[token] / page_size * pages.page_bytes;
    std::uint8_t* head = page + item.kv_head * pages.head_bytes;
    std::uint8_t* row = head + side.codes + slot * side.row_bytes;
    if (side.bits == kExactBits) {
      write_raw(pages, x, row);
      continue;
    }
    encode_vector(side, metric, x, space);
    pack_row(side, space.best.code, head_dim, row);
    const std::int64_t num_groups = head_dim / side.group_size;
    std::uint8_t* pairs = head + side.parameters + slot * num_groups * 4;
    for (std::int64_t group = 0; group < num_groups; ++group) write_pair(space.best.ranges[group], pairs + group * 4);
  }
}

inline void store_codes_of(const CacheStoreCall& call, const CacheStoreItem& item, void* scratch) {
  store_side(call, item, true, scratch);
  store_side(call, item, false, scratch);
}

// One vector out of exact pages.
template <class N>
void read_exact(const Pages& exact, std::int64_t head, std::int64_t slot, bool is_key, float* to) {
  const std::int64_t of_head = exact.head_dim * exact.page_size;
  if (!is_key) {
    const N* value = static_cast<const N*>(exact.values) + head * of_head + slot * exact.head_dim;
    return put_value(value, exact.head_dim, to);
  }
  const N* from = static_cast<const N*>(exact.keys) + head * of_head + slot;
  for (std::int64_t channel = 0; channel < exact.head_dim; ++channel) {
    to[channel] = load_some(from + channel * exact.page_size, 1)[0];
  }
}

// The vectors of a group along tokens, `[L, D]`: new ones from the step, earlier ones from exact pages.
inline void gather_group(
    const CacheStoreCall& call, const CacheStoreItem& item, bool is_key, std::int64_t first, float* to) {
  const CacheSide& side = is_key ? call.pages.keys : call.pages.values;
  const Pages& exact = call.pages.exact;
  const NewVectors vectors = new_vectors(call.tokens, is_key);
  const std::int64_t start = call.sequences.query_start[item.sequence];
  const std::int64_t num_new = call.sequences.query_start[item.sequence + 1] - start;
  const std::int64_t begin = call.sequences.context[item.sequence] - num_new;
  for (std::int64_t position = first; position < first + side.group_size; ++position, to += exact.head_dim) {
    if (position >= begin) {
      const std::int64_t token = start + position - begin;
      put_value(vectors.first + token * vectors.token_stride + item.kv_head * vectors.head_stride, exact.head_dim, to);
      continue;
    }
    const std::int64_t page =
        call.pages.exact_table[item.sequence * call.pages.exact_stride + position / exact.page_size];
    const std::int64_t head = page * exact.num_kv_heads + item.kv_head, slot = position % exact.page_size;
    switch (exact.type) {
      case NumberType::kFloat: read_exact<float>(exact, head, slot, is_key, to); break;
      case NumberType::kBFloat16: read_exact<BFloat16>(exact, head, slot, is_key, to); break;
      case NumberType::kHalf: read_exact<Half>(exact, head, slot, is_key, to); break;
    }
  }
}

// Codes of the group that begins at position `first`. `scratch`: its vectors, its codes, and two columns.
inline void store_group(
    const CacheStoreCall& call, const CacheStoreItem& item, bool is_key, std::int64_t first, float* scratch) {
  const CachePages& pages = call.pages;
  const CacheSide& side = is_key ? pages.keys : pages.values;
  const std::int64_t head_dim = pages.exact.head_dim, page_size = pages.exact.page_size, size = side.group_size;
  float* vectors = scratch;
  float* codes = vectors + size * head_dim;
  float* column = codes + size * head_dim;
  float* column_codes = column + padded_size(size);
  gather_group(call, item, is_key, first, vectors);
  const std::int64_t page = call.sequences.page_table[item.sequence * call.sequences.table_stride + first / page_size];
  std::uint8_t* head = pages.bytes + page * pages.page_bytes + item.kv_head * pages.head_bytes;
  std::uint8_t* pairs = head + side.parameters + first % page_size / size * head_dim * 4;
  for (std::int64_t channel = 0; channel < head_dim; ++channel) {
    for (std::int64_t index = 0; index < size; ++index) column[index] = vectors[index * head_dim + channel];
    const Range range = choose_range(side, column, nullptr, size);
    encode_group(side, column, size, range, column_codes);
    for (std::int64_t index = 0; index < size; ++index) codes[index * head_dim + channel] = column_codes[index];
    write_pair(range, pairs + channel * 4);
  }
  std::uint8_t* rows = head + side.codes + first % page_size * side.row_bytes;
  for (std::int64_t index = 0; index < size; ++index) {
    pack_row(side, codes + index * head_dim, head_dim, rows + index * side.row_bytes);
  }
}

inline void store_groups(const CacheStoreCall& call, const CacheStoreItem& item, void* scratch) {
  const std::int64_t start = call.sequences.query_start[item.sequence];
  const std::int64_t context = call.sequences.context[item.sequence];
  const std::int64_t begin = context - (call.sequences.query_start[item.sequence + 1] - start);
  for (int number = 0; number < 2; ++number) {
    const CacheSide& side = number == 0 ? call.pages.keys : call.pages.values;
    if (side.along_tokens == 0) continue;
    const std::int64_t size = side.group_size;
    for (std::int64_t first = begin / size * size; first + size <= context; first += size) {
      store_group(call, item, number == 0, first, static_cast<float*>(scratch));
    }
  }
}

inline std::size_t store_bytes(const CacheStoreCall& call) {
  const std::int64_t head_dim = call.pages.exact.head_dim;
  std::int64_t numbers = store_floats(head_dim);
  const CacheSide* const sides[] = {&call.pages.keys, &call.pages.values};
  for (const CacheSide* side : sides) {
    if (side->along_tokens == 0) continue;
    const std::int64_t needed = 2 * side->group_size * head_dim + 2 * padded_size(side->group_size);
    numbers = numbers < needed ? needed : numbers;
  }
  return static_cast<std::size_t>(numbers) * 4;
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
