// Codes of a tile as floats, where many rows want them or no product takes them as they are.
// Included once by each instruction set.
#pragma once

#include "cache_tile.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

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
    const CacheSide& side, std::int64_t head_dim, const TilePlace& place, const Blocks& blocks,
    const TileSpace& space) {
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
