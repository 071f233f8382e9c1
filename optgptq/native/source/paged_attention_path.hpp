// Attention and the storing of keys and values for one instruction set.
#pragma once

#include "paged_attention_tile.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Tokens whose slots follow each other in a page are written together: their numbers of a feature are neighbours.
template <class N>
void store_head(const StoreCall& call, std::int64_t kv_head) {
  const std::int64_t head_dim = call.pages.head_dim, page_size = call.pages.page_size;
  const std::int64_t of_head = head_dim * page_size, of_page = call.pages.num_kv_heads * of_head;
  for (std::int64_t token = 0, count; token < call.num_tokens; token += count) {
    const std::int64_t slot = call.slot[token], place = slot % page_size;
    count = 1;
    while (token + count < call.num_tokens && place + count < page_size && call.slot[token + count] == slot + count) {
      ++count;
    }
    const std::int64_t first = slot / page_size * of_page + kv_head * of_head;
    const float* key = call.key + token * call.key_token_stride + kv_head * call.key_head_stride;
    const float* value = call.value + token * call.value_token_stride + kv_head * call.value_head_stride;
    N* keys = static_cast<N*>(call.pages.keys) + first + place;
    N* values = static_cast<N*>(call.pages.values) + first + place * head_dim;
    for (std::int64_t feature = 0; feature < head_dim; ++feature, keys += page_size) {
      const float* number = key + feature;
      for (std::int64_t next = 0; next < count; ++next) narrow(number[next * call.key_token_stride], keys + next);
    }
    for (std::int64_t next = 0; next < count; ++next, values += head_dim, value += call.value_token_stride) {
      for (std::int64_t feature = 0; feature < head_dim; ++feature) narrow(value[feature], values + feature);
    }
  }
}

void store_tokens(const StoreCall& call, std::int64_t kv_head) {
  switch (call.pages.type) {
    case NumberType::kFloat: return store_head<float>(call, kv_head);
    case NumberType::kBFloat16: return store_head<BFloat16>(call, kv_head);
    case NumberType::kHalf: return store_head<Half>(call, kv_head);
  }
}

template <FloatVector (*function)(FloatVector)>
void apply(const float* from, float* to, std::int64_t size) {
  for (std::int64_t index = 0; index < size; index += kLanes) {
    const std::int64_t count = size - index < kLanes ? size - index : kLanes;
    store<float>(to + index, function(load<float>(from + index, count)), count);
  }
}

}  // namespace

PagedPath paged_path() { return {scratch_bytes, attend, store_tokens, apply<exponential>, apply<tangent>}; }

}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
