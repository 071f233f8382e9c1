// Where the keys and values of a tile lie: found by the page table, or brought together.
// Included once by each instruction set.
#pragma once

#include "paged_attention.hpp"
#include "paged_attention_products.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Say where the tile that begins at `first_key` lies; of its keys only `begin .. end - 1` are looked up.
template <class N>
TileNumbers<N> find_tile(
    const PagedCall& call, const PagedItem& item, std::int64_t first_key, std::int64_t begin, std::int64_t end) {
  const Pages& pages = call.pages;
  TileNumbers<N> tile;
  tile.page_size = pages.page_size;
  tile.head_dim = pages.head_dim;
  tile.page_stride = pages.num_kv_heads * pages.head_dim * pages.page_size;
  const std::int64_t head = item.kv_head * pages.head_dim * pages.page_size;
  tile.values = static_cast<const N*>(pages.values) + head;
  tile.offset = first_key % pages.page_size;
  tile.table = call.sequences.page_table + item.sequence * call.sequences.table_stride + first_key / pages.page_size;
  tile.pool_keys = static_cast<const N*>(pages.keys) + head;
  tile.ahead = (kKeys + pages.page_size - 1) / pages.page_size;
  tile.last = (call.sequences.context[item.sequence] - 1) / pages.page_size - first_key / pages.page_size;
  for (std::int64_t vector = begin / kLanes; vector * kLanes < end; ++vector) {
    const std::int64_t slot = tile.offset + vector * kLanes;
    const std::int64_t page = tile.table[slot / pages.page_size];
    tile.keys[vector] = static_cast<const N*>(pages.keys) + page * tile.page_stride + head + slot % pages.page_size;
  }
  return tile;
}

// The same keys and values as floats in one page of `kKeys` slots; those that nothing sees are not copied.
template <class N>
TileNumbers<float> copy_tile(const TileNumbers<N>& tile, const std::int64_t seen[2], float* copy) {
  static const std::int32_t only_page = 0;
  TileNumbers<float> result;
  for (std::int64_t vector = 0; vector < kKeyVectors; ++vector) {
    result.keys[vector] = copy + vector * kLanes;
    if ((vector + 1) * kLanes <= seen[0] || vector * kLanes >= seen[1]) continue;
    for (std::int64_t feature = 0; feature < tile.head_dim; ++feature) {
      const FloatVector key = load_numbers(tile.keys[vector] + feature * tile.page_size);
      __builtin_memcpy(copy + feature * kKeys + vector * kLanes, &key, sizeof key);
    }
  }
  float* values = copy + kKeys * tile.head_dim;
  for (std::int64_t key = seen[0]; key < seen[1]; ++key) {
    const std::int64_t slot = tile.offset + key;
    const std::int64_t page = tile.table[slot / tile.page_size];
    const N* value = tile.values + page * tile.page_stride + slot % tile.page_size * tile.head_dim;
    float* to = values + key * tile.head_dim;
    for (std::int64_t feature = 0; feature < tile.head_dim; feature += kLanes) {
      const std::int64_t rest = tile.head_dim - feature;
      const FloatVector number = rest < kLanes ? load_some(value + feature, rest) : load_numbers(value + feature);
      store<float>(to + feature, number, rest < kLanes ? rest : kLanes);
    }
  }
  result.values = result.pool_keys = values;
  result.ahead = result.last = 0;
  result.table = &only_page;
  result.offset = result.page_stride = 0;
  result.page_size = kKeys;
  result.head_dim = tile.head_dim;
  return result;
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
