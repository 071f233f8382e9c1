// A tile of codes, ready for products. Included once by each instruction set.
#pragma once

#include "cache_exact.hpp"
#include "cache_unpack.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Rows from which on codes become floats first; below, products take them as they are.
constexpr std::int64_t kRowsOfFloats = 8;

// A call of `name<bits>` for the bits that a side has.
#define OPTGPTQ_FOR_BITS(bits, name, ...)    \
  switch (bits) {                            \
    case 8: name<8>(__VA_ARGS__); break;     \
    case 4: name<4>(__VA_ARGS__); break;     \
    case 3: name<3>(__VA_ARGS__); break;     \
    default: name<2>(__VA_ARGS__); break;    \
  }

inline void find_keys(
    const CachePages& pages, const TilePlace& place, const Blocks& blocks, const TileSpace& space, bool few_rows,
    CacheTile& tile) {
  const CacheSide& side = pages.keys;
  const std::int64_t head_dim = pages.exact.head_dim;
  if (side.bits == kExactBits) return copy_raw_side(pages, side, place, blocks, true, space.keys);
  const std::uint8_t* rows[kBlocks];
  rows_of(side, blocks, rows);
  turn_rows(rows, side.row_bytes, space.turned);
  if (side.along_tokens != 0) {
    OPTGPTQ_FOR_BITS(side.bits, unpack_key_groups, side, head_dim, place, blocks, space)
    return;
  }
  float* minimum = space.parameters + num_parameters(side, head_dim);
  load_parameters(side, head_dim, blocks, space.parameters, minimum);
  const bool whole = is_whole(side, head_dim);
  if (whole) {
    tile.key_scale = space.parameters;
    tile.key_minimum = minimum;
  }
  if (few_rows) {
    tile.key_codes.bytes = space.turned;
    tile.key_codes.head_dim = head_dim;
    tile.key_codes.pairs = {whole ? nullptr : space.parameters, minimum - space.parameters, side.group_size};
    return;
  }
  OPTGPTQ_FOR_BITS(side.bits, unpack_keys, side, head_dim, place, space)
}

inline void find_values(
    const CachePages& pages, const TilePlace& place, const Blocks& blocks, const TileSpace& space, bool few_rows,
    CacheTile& tile) {
  const CacheSide& side = pages.values;
  const std::int64_t head_dim = pages.exact.head_dim;
  if (side.bits == kExactBits) return copy_raw_side(pages, side, place, blocks, false, space.values);
  float* scale = space.parameters + 2 * num_parameters(pages.keys, head_dim);
  float* minimum = scale + num_parameters(side, head_dim);
  if (side.along_tokens == 0) load_parameters(side, head_dim, blocks, scale, minimum);
  const bool whole = is_whole(side, head_dim);
  if (whole) {
    tile.value_scale = scale;
    tile.value_minimum = minimum;
  }
  const bool takes_groups = whole || (side.along_tokens == 0 && side.group_size % kLanes == 0);
  if (few_rows && takes_groups && has_fused_values(side.bits, head_dim)) {
    rows_of(side, blocks, tile.value_codes.blocks);
    tile.value_codes.row_bytes = side.row_bytes;
    tile.value_codes.head_dim = head_dim;
    tile.value_codes.shifts = space.shifts;
    tile.value_codes.pairs = {whole ? nullptr : scale, minimum - scale, side.group_size};
    return;
  }
  OPTGPTQ_FOR_BITS(side.bits, unpack_values, side, head_dim, place, blocks, space, scale)
}

#undef OPTGPTQ_FOR_BITS

// Processors do not read ahead across pages of memory: everything of the next tile is asked for.
inline void ask_for(const CachePages& pages, const Blocks& blocks) {
  const std::int64_t line = 64;
  const CacheSide* const sides[] = {&pages.keys, &pages.values};
  for (std::int64_t block = 0; block < kBlocks; ++block) {
    for (const CacheSide* side : sides) {
      const std::uint8_t* row = blocks.head[block] + side->codes + blocks.slot[block] * side->row_bytes;
      for (std::int64_t byte = 0; byte < kBlockKeys * side->row_bytes; byte += line) {
        __builtin_prefetch(row + byte, 0, 2);
      }
      if (side->bits == kExactBits || side->along_tokens != 0) continue;
      const std::int64_t of_key = pages.exact.head_dim / side->group_size * 4;
      const std::uint8_t* pairs = blocks.head[block] + side->parameters + blocks.slot[block] * of_key;
      for (std::int64_t byte = 0; byte < kBlockKeys * of_key; byte += line) __builtin_prefetch(pairs + byte, 0, 2);
    }
  }
}

// `last` is the end of the codes that are needed, counted from the first key of the tile.
inline CacheTile code_tile(
    const CacheCall& call, const TilePlace& place, std::int64_t last, const TileSpace& space, std::int64_t num_rows) {
  CacheTile tile = float_tile(call.pages.exact.head_dim, space);
  const Blocks blocks = find_blocks(call.pages, call.sequences, place);
  if (last > kKeys) {
    TilePlace next = place;
    next.first_key += kKeys;
    next.begin = 0;
    next.end = last - kKeys < kKeys ? last - kKeys : kKeys;
    ask_for(call.pages, find_blocks(call.pages, call.sequences, next));
  }
  find_keys(call.pages, place, blocks, space, num_rows < kRowsOfFloats, tile);
  find_values(call.pages, place, blocks, space, num_rows < kRowsOfFloats, tile);
  return tile;
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
