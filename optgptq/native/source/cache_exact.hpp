// Keys and values in full precision, brought into one piece of floats: from exact pages, from the step itself, or from
// the rows of codes of a side that is exact. Included once by each instruction set.
#pragma once

#include "cache_tile.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

template <class N>
OPTGPTQ_INLINE FloatVector load_rest(const N* from, std::int64_t rest) {
  return rest < kLanes ? load_some(from, rest) : load_numbers(from);
}

// One key among `[D, 64]`.
template <class N>
OPTGPTQ_INLINE void put_key(const N* key, std::int64_t head_dim, float* to) {
  for (std::int64_t channel = 0; channel < head_dim; channel += kLanes) {
    const std::int64_t lanes = head_dim - channel < kLanes ? head_dim - channel : kLanes;
    const FloatVector number = load_rest(key + channel, head_dim - channel);
    for (std::int64_t lane = 0; lane < lanes; ++lane) to[(channel + lane) * kKeys] = number[lane];
  }
}

template <class N>
OPTGPTQ_INLINE void put_value(const N* value, std::int64_t head_dim, float* to) {
  for (std::int64_t channel = 0; channel < head_dim; channel += kLanes) {
    const std::int64_t rest = head_dim - channel;
    store<float>(to + channel, load_rest(value + channel, rest), rest < kLanes ? rest : kLanes);
  }
}

template <class N>
void copy_raw(
    const CacheSide& side, std::int64_t head_dim, const TilePlace& place, const Blocks& blocks, bool is_key,
    float* to) {
  const std::uint8_t* rows[kBlocks];
  rows_of(side, blocks, rows);
  for (std::int64_t key = place.begin; key < place.end; ++key) {
    const auto* row = reinterpret_cast<const N*>(rows[key / kBlockKeys] + key % kBlockKeys * side.row_bytes);
    if (is_key) {
      put_key(row, head_dim, to + key);
    } else {
      put_value(row, head_dim, to + key * head_dim);
    }
  }
}

// The numbers of a side without codes, out of its pages of bytes.
inline void copy_raw_side(
    const CachePages& pages, const CacheSide& side, const TilePlace& place, const Blocks& blocks, bool is_key,
    float* to) {
  const std::int64_t head_dim = pages.exact.head_dim;
  switch (pages.type) {
    case NumberType::kFloat: return copy_raw<float>(side, head_dim, place, blocks, is_key, to);
    case NumberType::kBFloat16: return copy_raw<BFloat16>(side, head_dim, place, blocks, is_key, to);
    case NumberType::kHalf: return copy_raw<Half>(side, head_dim, place, blocks, is_key, to);
  }
}

// Keys `place.begin .. end - 1` out of exact pages.
template <class N>
void copy_pages(const CachePages& pages, const TilePlace& place, std::int64_t end, const TileSpace& space) {
  const Pages& exact = pages.exact;
  const std::int32_t* table = pages.exact_table + place.sequence * pages.exact_stride;
  const std::int64_t of_head = exact.head_dim * exact.page_size, page_size = exact.page_size;
  const auto head_of = [&](std::int64_t position) {
    return (table[position / page_size] * exact.num_kv_heads + place.kv_head) * of_head;
  };
  for (std::int64_t key = place.begin / kLanes * kLanes; key < end; key += kLanes) {
    const std::int64_t position = place.first_key + key;
    const N* keys = static_cast<const N*>(exact.keys) + head_of(position) + position % page_size;
    for (std::int64_t channel = 0; channel < exact.head_dim; ++channel) {
      const FloatVector number = load_numbers(keys + channel * page_size);
      __builtin_memcpy(space.keys + channel * kKeys + key, &number, sizeof number);
    }
  }
  for (std::int64_t key = place.begin; key < end; ++key) {
    const std::int64_t position = place.first_key + key;
    const N* value =
        static_cast<const N*>(exact.values) + head_of(position) + position % page_size * exact.head_dim;
    put_value(value, exact.head_dim, space.values + key * exact.head_dim);
  }
}

// Positions before the step's own, `own_begin`, are in exact pages; token `first_token` of the step is at `own_begin`.
inline CacheTile exact_tile(
    const CacheCall& call, const TilePlace& place, std::int64_t own_begin, std::int64_t first_token,
    const TileSpace& space) {
  const std::int64_t head_dim = call.pages.exact.head_dim;
  const std::int64_t own = own_begin - place.first_key;
  const std::int64_t past_end = own < place.end ? own : place.end;
  if (place.begin < past_end) {
    switch (call.pages.exact.type) {
      case NumberType::kFloat: copy_pages<float>(call.pages, place, past_end, space); break;
      case NumberType::kBFloat16: copy_pages<BFloat16>(call.pages, place, past_end, space); break;
      case NumberType::kHalf: copy_pages<Half>(call.pages, place, past_end, space); break;
    }
  }
  const NewTokens& tokens = call.tokens;
  for (std::int64_t key = place.begin > past_end ? place.begin : past_end; key < place.end; ++key) {
    const std::int64_t token = first_token + key - own;
    const float* from = tokens.key + token * tokens.key_token_stride + place.kv_head * tokens.key_head_stride;
    put_key(from, head_dim, space.keys + key);
    from = tokens.value + token * tokens.value_token_stride + place.kv_head * tokens.value_head_stride;
    put_value(from, head_dim, space.values + key * head_dim);
  }
  return float_tile(head_dim, space);
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
