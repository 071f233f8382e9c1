// Products of quantized activations with the planes of a weight in binary coding, a group of a tile at a time.
// Included once by each instruction set. Sums of a plane are sums over the columns whose bit is set; every sum has one
// order, whatever the number of tokens: blocks of a group for each plane, then planes, offset and groups.
#pragma once

#include "binary_products.hpp"
#include "products_codes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// A plane's bits stay up to 3 places up in their bytes, which spares moving them down; sums are as many times too large.
// The last of an odd number of planes has a chunk of its own, others lie between the bits of their neighbours.
constexpr bool is_alone(int planes, int plane) { return planes % 2 == 1 && plane == planes - 1; }

constexpr int chunk_of(int planes, int plane, int index) {
  if (is_alone(planes, plane)) return planes - 1;
  return index % (planes == 4 ? 4 : 2);
}

// Where the bit of a quad is in its byte.
constexpr int bit_of(int planes, int plane, int index) {
  if (is_alone(planes, plane)) return index;
  return plane + (planes == 4 ? index / 4 * 4 : index / 2 * 2);
}

// Few tokens have two sums for each plane: the bits of every other quad stay further up, and their sum is moved down
// before the two are added. For many tokens it costs less to move bits than sums.
constexpr int num_plane_sums(int planes, int tokens) { return planes == 4 || tokens > 2 ? 1 : 2; }
constexpr int places_apart(int planes, int plane) { return is_alone(planes, plane) ? 1 : 2; }
constexpr bool is_further_up(int planes, int plane, int index) {
  return is_alone(planes, plane) ? index % 2 != 0 : index / 2 % 2 != 0;
}

// How far up bits stay, but for those further up.
constexpr int place_of(int planes, int plane) { return is_alone(planes, plane) ? 0 : plane; }

// What a plane's sum is multiplied with to stand for twice the sum over its set bits.
constexpr float doubling(int planes, int plane) {
  return 2.0f / static_cast<float>(1 << place_of(planes, plane));
}

template <int planes>
struct PlaneChunks {
  ByteVector chunks[planes];
};

template <int planes, int plane, int tokens, int index>
OPTGPTQ_INLINE void add_plane_quads(const PlaneChunks<planes>& from, const std::int8_t* codes,
                                    BlockSums<4> (&sums)[tokens][2]) {
  constexpr bool which = num_plane_sums(planes, tokens) == 2 && is_further_up(planes, plane, index);
  constexpr int place = place_of(planes, plane) + (which ? places_apart(planes, plane) : 0);
  constexpr int turn = bit_of(planes, plane, index) - place;
  const ByteVector turned = turned_down<turn>(from.chunks[chunk_of(planes, plane, index)]);
  const ByteVector bits = turned & static_cast<std::uint8_t>(1 << place);
  for (int token = 0; token < tokens; ++token) {
    add_products<4>(sums[token][which], bits, quad_at(codes + token * kBlockColumns, index));
  }
  if constexpr (index + 1 < kQuads) add_plane_quads<planes, plane, tokens, index + 1>(from, codes, sums);
}

// Some tokens: activations as `ProductInputs` has them, from the first of these tokens on.
struct BinaryTokens {
  const std::int8_t* codes;
  const float* scales;
  const float* sums;
  std::int64_t num_tokens;   // from one block to the next
  std::int64_t bytes_ahead;  // as `ProductInputs` has it
};

template <int planes, int plane, int tokens>
OPTGPTQ_INLINE void add_planes(const PlaneChunks<planes>& from, const std::int8_t* codes, const float* scales,
                               FloatVector (&products)[planes][tokens]) {
  BlockSums<4> sums[tokens][2] = {};
  add_plane_quads<planes, plane, tokens, 0>(from, codes, sums);
  for (int token = 0; token < tokens; ++token) {
    IntVector sum = whole_sums<4>(sums[token][0]);
    if constexpr (num_plane_sums(planes, tokens) == 2) sum += whole_sums<4>(sums[token][1]) >> places_apart(planes, plane);
    products[plane][token] = fused(floats(sum), every(scales[token]), products[plane][token]);
  }
  if constexpr (plane + 1 < planes) add_planes<planes, plane + 1, tokens>(from, codes, scales, products);
}

// Add a group to the results of the rows of vector `part`; `at` counts tiles and groups.
template <int planes, int tokens>
OPTGPTQ_INLINE void add_binary_group(const BinaryCodes& weight, std::int64_t at, const std::uint8_t* codes,
                                     const BinaryTokens& of, int part, FloatVector (&results)[tokens]) {
  const std::int64_t num_blocks = weight.num_blocks / weight.num_groups;
  FloatVector products[planes][tokens] = {};
  const std::uint8_t* from = codes + part * OPTGPTQ_VECTOR_BYTES;
  for (std::int64_t block = 0; block < num_blocks; ++block) {
    if (part == 0) ask_ahead<planes>(from, of.bytes_ahead);
    PlaneChunks<planes> chunks;
    for (int index = 0; index < planes; ++index) chunks.chunks[index] = load_once(from + index * kChunk);
    const std::int64_t first = block * of.num_tokens;
    add_planes<planes, 0, tokens>(chunks, of.codes + first * kBlockColumns, of.scales + first, products);
    from += block_bytes<planes>();
  }
  for (int plane = 0; plane < planes; ++plane) {
    const FloatVector alpha = coefficients(weight.alphas, weight.scale_type, at * planes + plane, part);
    const FloatVector twice = every(doubling(planes, plane));
    for (int token = 0; token < tokens; ++token) {
      const FloatVector signs = fused(twice, products[plane][token], every(-of.sums[token]));
      results[token] = fused(alpha, signs, results[token]);
    }
  }
  const FloatVector offset = coefficients(weight.offsets, weight.scale_type, at, part);
  for (int token = 0; token < tokens; ++token) results[token] = fused(offset, every(of.sums[token]), results[token]);
}

// The sums of one plane over a group's blocks.
template <int planes, int plane, int tokens>
OPTGPTQ_INLINE void add_plane(const std::uint8_t* from, const BinaryTokens& of, std::int64_t num_blocks,
                              FloatVector (&products)[tokens]) {
  for (std::int64_t block = 0; block < num_blocks; ++block) {
    if constexpr (plane == 0) ask_ahead<planes>(from, of.bytes_ahead);
    PlaneChunks<planes> chunks;
    for (int index = 0; index < planes; ++index) chunks.chunks[index] = load_bytes(from + index * kChunk);
    const std::int64_t first = block * of.num_tokens;
    BlockSums<4> sums[tokens][2] = {};
    add_plane_quads<planes, plane, tokens, 0>(chunks, of.codes + first * kBlockColumns, sums);
    for (int token = 0; token < tokens; ++token) {
      IntVector sum = whole_sums<4>(sums[token][0]);
      if constexpr (num_plane_sums(planes, tokens) == 2) sum += whole_sums<4>(sums[token][1]) >> places_apart(planes, plane);
      products[token] = fused(floats(sum), every(of.scales[first + token]), products[token]);
    }
    from += block_bytes<planes>();
  }
}

// The same as `add_binary_group`, one plane after the other: faster for several tokens, for whose sums of all planes
// there are no registers.
template <int planes, int tokens, int plane = 0>
OPTGPTQ_INLINE void add_group_by_planes(const BinaryCodes& weight, std::int64_t at, const std::uint8_t* codes,
                                        const BinaryTokens& of, int part, FloatVector (&results)[tokens]) {
  FloatVector products[tokens] = {};
  const std::int64_t num_blocks = weight.num_blocks / weight.num_groups;
  add_plane<planes, plane, tokens>(codes + part * OPTGPTQ_VECTOR_BYTES, of, num_blocks, products);
  const FloatVector alpha = coefficients(weight.alphas, weight.scale_type, at * planes + plane, part);
  const FloatVector twice = every(doubling(planes, plane));
  for (int token = 0; token < tokens; ++token) {
    results[token] = fused(alpha, fused(twice, products[token], every(-of.sums[token])), results[token]);
  }
  if constexpr (plane + 1 < planes) {
    add_group_by_planes<planes, tokens, plane + 1>(weight, at, codes, of, part, results);
  } else {
    const FloatVector offset = coefficients(weight.offsets, weight.scale_type, at, part);
    for (int token = 0; token < tokens; ++token) {
      results[token] = fused(offset, every(of.sums[token]), results[token]);
    }
  }
}

// Row tiles with few tokens, whose results stay in registers.
template <int planes, int tokens>
void few_binary_tokens(const BinaryCodes& weight, const ProductInputs& inputs, const ProductOutput& output,
                       std::int64_t begin, std::int64_t end) {
  const std::int64_t group_blocks = inputs.num_blocks / inputs.num_groups;
  const std::uint8_t* codes = weight.codes + begin * inputs.num_blocks * block_bytes<planes>();
  for (std::int64_t tile = begin; tile < end; ++tile) {
    FloatVector results[kParts][tokens] = {};
    BinaryTokens of{inputs.codes, inputs.scales, inputs.sums, tokens, inputs.bytes_ahead};
    for (std::int64_t group = 0; group < inputs.num_groups; ++group) {
      for (int part = 0; part < kParts; ++part) {
        const std::int64_t at = tile * inputs.num_groups + group;
        if constexpr (tokens == 1) {
          add_binary_group<planes, tokens>(weight, at, codes, of, part, results[part]);
        } else {
          add_group_by_planes<planes, tokens>(weight, at, codes, of, part, results[part]);
        }
      }
      codes += group_blocks * block_bytes<planes>();
      of.codes += group_blocks * tokens * kBlockColumns;
      of.scales += group_blocks * tokens;
      of.sums += tokens;
    }
    for (int token = 0; token < tokens; ++token) {
      for (int part = 0; part < kParts; ++part) {
        put_results(results[part][token], output, token, tile * kTileRows + part * kLanes, weight.num_rows);
      }
    }
  }
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
