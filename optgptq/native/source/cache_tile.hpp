// A tile of keys and values: found in pages of codes, or brought together in full precision.
// Included once by each instruction set.
#pragma once

#include "cache_products.hpp"
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

// Lanes `begin .. end - 1` only.
OPTGPTQ_INLINE void store_lanes(float* to, FloatVector numbers, std::int64_t begin, std::int64_t end) {
  for (std::int64_t lane = begin; lane < end; ++lane) to[lane] = numbers[lane];
}

// Keys of groups along channels, by vectors: channels in the order of codes, `[D, 64]`.
template <int kBits>
void unpack_keys(const CacheSide& side, std::int64_t head_dim, const TilePlace& place, const TileSpace& space) {
  constexpr int planes = static_cast<int>(planes_of(kBits));
  const bool whole = is_whole(side, head_dim);
  const std::int64_t part = head_dim / planes;
  const std::int64_t to_minimums = num_parameters(side, head_dim);
  for (std::int64_t key = place.begin / kLanes * kLanes; key < place.end; key += kLanes) {
    const float* scale = space.parameters + key;
    std::int64_t left = side.group_size;
    for (int plane = 0; plane < planes; ++plane) {
      float* to = space.keys + key + plane * kKeys;
      for (std::int64_t byte = 0; byte < part; ++byte, to += planes * kKeys) {
        FloatVector number = as_floats(codes_at<kBits>(space.turned + key, head_dim, byte, plane, kKeys));
        if (!whole) number = multiply_add(number, load_numbers(scale), load_numbers(scale + to_minimums));
        __builtin_memcpy(to, &number, sizeof number);
        if (--left > 0) continue;
        left = side.group_size;
        scale += kKeys;
      }
    }
  }
}

// The same for groups along tokens; a vector may hold keys of two groups.
template <int kBits>
void unpack_key_groups(
    const CacheSide& side, std::int64_t head_dim, const TilePlace& place, const Blocks& blocks, const TileSpace& space) {
  constexpr int planes = static_cast<int>(planes_of(kBits));
  const std::int64_t part = head_dim / planes;
  float* scale = space.parameters;
  float* minimum = scale + num_parameters(side, head_dim);
  for (std::int64_t begin = place.begin, end; begin < place.end; begin = end) {
    end = group_end(side, place, begin);
    load_group(side, head_dim, blocks, begin, scale, minimum);
    for (std::int64_t key = begin / kLanes * kLanes; key < end; key += kLanes) {
      const std::int64_t low = key < begin ? begin - key : 0, high = end - key < kLanes ? end - key : kLanes;
      float* to = space.keys + key;
      for (std::int64_t byte = 0; byte < part; ++byte) {
        for (int plane = 0; plane < planes; ++plane, to += kKeys) {
          const std::int64_t channel = plane * part + byte;
          FloatVector number = as_floats(codes_at<kBits>(space.turned + key, head_dim, byte, plane, kKeys));
          number = multiply_add(number, every(scale[channel]), every(minimum[channel]));
          if (high - low == kLanes) {
            __builtin_memcpy(to, &number, sizeof number);
          } else {
            store_lanes(to, number, low, high);
          }
        }
      }
    }
  }
}

// Codes of one value as floats; what is written beyond the last channel means nothing.
template <int kBits>
OPTGPTQ_INLINE void unpack_row(const std::uint8_t* row, std::int64_t head_dim, float* to) {
  constexpr int planes = static_cast<int>(planes_of(kBits));
  const std::int64_t part = head_dim / planes;
  for (int plane = 0; plane < planes; ++plane) {
    for (std::int64_t byte = 0; byte < part; byte += kLanes) {
      const FloatVector number = as_floats(codes_at<kBits>(row, head_dim, byte, plane, 1));
      __builtin_memcpy(to + plane * part + byte, &number, sizeof number);
    }
  }
}

OPTGPTQ_INLINE void apply_pairs(float* numbers, std::int64_t count, FloatVector scale, FloatVector minimum) {
  for (std::int64_t index = 0; index < count; index += kLanes) {
    const std::int64_t lanes = count - index < kLanes ? count - index : kLanes;
    store<float>(numbers + index, multiply_add(load<float>(numbers + index, lanes), scale, minimum), lanes);
  }
}

template <int kBits>
void unpack_values(
    const CacheSide& side, std::int64_t head_dim, const TilePlace& place, const Blocks& blocks, const TileSpace& space,
    float* scale) {
  float* minimum = scale + num_parameters(side, head_dim);
  const std::int64_t num_groups = side.along_tokens != 0 ? 1 : head_dim / side.group_size;
  const std::uint8_t* rows[kBlocks];
  rows_of(side, blocks, rows);
  std::int64_t stop = place.begin;
  for (std::int64_t key = place.begin; key < place.end; ++key) {
    float* to = space.values + key * head_dim;
    unpack_row<kBits>(rows[key / kBlockKeys] + key % kBlockKeys * side.row_bytes, head_dim, to);
    if (side.along_tokens != 0) {
      if (key == stop) {
        load_group(side, head_dim, blocks, key, scale, minimum);
        stop = group_end(side, place, key);
      }
      for (std::int64_t channel = 0; channel < head_dim; channel += kLanes) {
        const FloatVector number = load_numbers(to + channel);
        const FloatVector value =
            multiply_add(number, load_numbers(scale + channel), load_numbers(minimum + channel));
        __builtin_memcpy(to + channel, &value, sizeof value);
      }
    } else if (num_groups > 1) {
      for (std::int64_t group = 0; group < num_groups; ++group) {
        const std::int64_t at = group * kKeys + key;
        apply_pairs(to + group * side.group_size, side.group_size, every(scale[at]), every(minimum[at]));
      }
    }
  }
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
