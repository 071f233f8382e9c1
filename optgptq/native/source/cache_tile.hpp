// A tile of keys and values: found in pages of codes, or brought together in full precision.
// Included once by each instruction set.
#pragma once

#include "cache_values.hpp"
#include "paged_attention_tile.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// One tile. Where `key_scale` is there, the product with a key is scale * (query . numbers) + minimum * (sum of query),
// and likewise for values; else the numbers stand for themselves.
struct CacheTile {
  TileNumbers<float> numbers;
  KeyRows key_codes;              // bytes null: `numbers` has the keys
  ValueRows value_codes;          // first block null: `numbers` has the values
  const float* key_scale;         // [64], like the three below; null: none
  const float* key_minimum;
  const float* value_scale;
  const float* value_minimum;
};

// Work space of a tile.
struct TileSpace {
  float* keys;         // [D, 64]
  float* values;       // [64, D] and a vector
  float* parameters;   // scales, then minimums, of keys and of values
  std::int32_t* shifts;
  std::uint8_t* turned;
};

// Which tile, and which of its keys are needed.
struct TilePlace {
  std::int64_t kv_head, sequence, first_key, begin, end;
};

// One scale and minimum for each key, or value: they are applied to sums instead of numbers.
inline bool is_whole(const CacheSide& side, std::int64_t head_dim) {
  return side.bits != kExactBits && side.along_tokens == 0 && side.group_size == head_dim;
}

inline std::int64_t num_parameters(const CacheSide& side, std::int64_t head_dim) {
  if (side.bits == kExactBits) return 0;
  return side.along_tokens != 0 ? (head_dim + kLanes) : head_dim / side.group_size * kKeys;
}

inline std::int64_t space_bytes(const CachePages& pages) {
  const std::int64_t head_dim = pages.exact.head_dim;
  const std::int64_t keys = num_parameters(pages.keys, head_dim), values = num_parameters(pages.values, head_dim);
  const std::int64_t numbers = 2 * kKeys * padded_dim(head_dim) + kLanes + 2 * (keys + values + head_dim);
  return (numbers * 4 + 63) / 64 * 64 + turned_bytes(pages.keys.row_bytes) * kKeys;
}

inline TileSpace lay_out(const CachePages& pages, void* memory) {
  const std::int64_t head_dim = pages.exact.head_dim, numbers = kKeys * padded_dim(head_dim);
  TileSpace space;
  space.keys = static_cast<float*>(memory);
  space.values = space.keys + numbers;
  space.shifts = reinterpret_cast<std::int32_t*>(space.values + numbers + kLanes);
  space.parameters = space.values + numbers + kLanes + 2 * head_dim;
  space.turned = static_cast<std::uint8_t*>(memory) + space_bytes(pages) - turned_bytes(pages.keys.row_bytes) * kKeys;
  if (pages.values.bits != kExactBits) set_shifts(pages.values.bits, head_dim, space.shifts);
  return space;
}

// A tile whose keys and values are floats in the work space.
inline CacheTile float_tile(std::int64_t head_dim, const TileSpace& space) {
  static const std::int32_t only_page = 0;
  CacheTile tile = {};
  TileNumbers<float>& numbers = tile.numbers;
  for (std::int64_t vector = 0; vector < kKeyVectors; ++vector) numbers.keys[vector] = space.keys + vector * kLanes;
  numbers.values = numbers.pool_keys = space.values;
  numbers.table = &only_page;
  numbers.page_size = kKeys;
  numbers.head_dim = head_dim;
  return tile;
}

// Where each block of a tile begins in its page, at the head; blocks that are not needed stand for the first that is.
struct Blocks {
  const std::uint8_t* head[kBlocks];
  std::int64_t slot[kBlocks];
};

inline Blocks find_blocks(const CachePages& pages, const PagedSequences& sequences, const TilePlace& place) {
  const std::int32_t* table = sequences.page_table + place.sequence * sequences.table_stride;
  const std::int64_t first = place.begin / kBlockKeys, last = (place.end - 1) / kBlockKeys;
  Blocks blocks;
  for (std::int64_t block = 0; block < kBlocks; ++block) {
    const std::int64_t key = place.first_key + (block < first || block > last ? first : block) * kBlockKeys;
    const std::int64_t page = table[key / pages.exact.page_size];
    blocks.head[block] = pages.bytes + page * pages.page_bytes + place.kv_head * pages.head_bytes;
    blocks.slot[block] = key % pages.exact.page_size;
  }
  return blocks;
}

inline void rows_of(const CacheSide& side, const Blocks& blocks, const std::uint8_t** rows) {
  for (std::int64_t block = 0; block < kBlocks; ++block) {
    rows[block] = blocks.head[block] + side.codes + blocks.slot[block] * side.row_bytes;
  }
}

// Pairs of scale and minimum, as many as a vector has lanes.
OPTGPTQ_INLINE void split_pairs(const std::uint8_t* pairs, float* scale, float* minimum) {
#if OPTGPTQ_VECTOR_BYTES == 64
  const auto* halves = reinterpret_cast<const Half*>(pairs);
  const __m512 low = (__m512)load_numbers(halves), high = (__m512)load_numbers(halves + kLanes);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  _mm512_storeu_ps(scale, _mm512_permutex2var_ps(low, even, high));
  _mm512_storeu_ps(minimum, _mm512_permutex2var_ps(low, odd, high));
#else
  std::uint16_t low[kLanes], high[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    __builtin_memcpy(low + lane, pairs + 4 * lane, 2);
    __builtin_memcpy(high + lane, pairs + 4 * lane + 2, 2);
  }
  const FloatVector scales = load_numbers(reinterpret_cast<const Half*>(low));
  const FloatVector minimums = load_numbers(reinterpret_cast<const Half*>(high));
  __builtin_memcpy(scale, &scales, sizeof scales);
  __builtin_memcpy(minimum, &minimums, sizeof minimums);
#endif
}

// Scales and minimums `[groups, 64]` of groups along channels.
inline void load_parameters(
    const CacheSide& side, std::int64_t head_dim, const Blocks& blocks, float* scale, float* minimum) {
  const std::int64_t num_groups = head_dim / side.group_size, pair_bytes = 4;
  for (std::int64_t block = 0; block < kBlocks; ++block) {
    const std::uint8_t* pairs =
        blocks.head[block] + side.parameters + blocks.slot[block] * num_groups * pair_bytes;
    for (std::int64_t group = 0; group < num_groups; ++group, pairs += pair_bytes) {
      std::uint8_t gathered[kBlockKeys * pair_bytes];
      for (std::int64_t key = 0; num_groups > 1 && key < kBlockKeys; ++key) {
        __builtin_memcpy(gathered + key * pair_bytes, pairs + key * num_groups * pair_bytes, pair_bytes);
      }
      const std::uint8_t* from = num_groups > 1 ? gathered : pairs;
      const std::int64_t to = group * kKeys + block * kBlockKeys;
      for (std::int64_t key = 0; key < kBlockKeys; key += kLanes) {
        split_pairs(from + key * pair_bytes, scale + to + key, minimum + to + key);
      }
    }
  }
}

// Scales and minimums `[D]` of the group along tokens that key `key` of the tile is in.
inline void load_group(
    const CacheSide& side, std::int64_t head_dim, const Blocks& blocks, std::int64_t key, float* scale,
    float* minimum) {
  const std::int64_t block = key / kBlockKeys, slot = blocks.slot[block] + key % kBlockKeys;
  const std::uint8_t* pairs = blocks.head[block] + side.parameters + slot / side.group_size * head_dim * 4;
  std::int64_t channel = 0;
  for (; channel + kLanes <= head_dim; channel += kLanes) {
    split_pairs(pairs + channel * 4, scale + channel, minimum + channel);
  }
  if (channel == head_dim) return;
  std::uint8_t rest[kLanes * 4] = {};
  __builtin_memcpy(rest, pairs + channel * 4, static_cast<std::size_t>(head_dim - channel) * 4);
  split_pairs(rest, scale + channel, minimum + channel);
}

// The first key after `key` that is in another group along tokens.
inline std::int64_t group_end(const CacheSide& side, const TilePlace& place, std::int64_t key) {
  const std::int64_t end = key + side.group_size - (place.first_key + key) % side.group_size;
  return end < place.end ? end : place.end;
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
