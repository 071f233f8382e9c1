// Products of quantized activations with codes on uniform grids, a tile of 16 rows at a time.
// Included once by each instruction set. Every sum has one order, whatever the number of tokens: blocks of a group, then
// groups.
#pragma once

#include "products_codes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Codes leave a block's chunks by a mask where they can, up to `most_places` up in their bytes, whose products are as many
// times too large: the sums of a block are moved down once then, in place of each quad.
constexpr int most_places(int bits) { return bits > 4 || (bits == 4 && !kWholeBytes) ? 0 : bits == 4 ? 4 : 2; }

template <int bits>
constexpr int places_of(int index) {
  return bits == 4 ? index / 4 * most_places(bits) : index / 2 % 2 * most_places(bits);
}

// Codes of up to 4 bits that have a byte each, laid out like codes of 8 bits.
constexpr int kSpread = 5;

template <int bits>
constexpr int num_chunks() {
  return bits == kSpread ? 8 : bits;
}

template <int bits>
struct BlockChunks {
  ByteVector chunks[num_chunks<bits>()];
};

template <int bits>
OPTGPTQ_INLINE BlockChunks<bits> chunks_of(const std::uint8_t* block) {
  BlockChunks<bits> of_block;
  for (int index = 0; index < num_chunks<bits>(); ++index) of_block.chunks[index] = load_once(block + index * kChunk);
  return of_block;
}

template <int bits, int index>
OPTGPTQ_INLINE ByteVector placed_codes(const BlockChunks<bits>& from) {
  constexpr int places = places_of<bits>(index);
  if constexpr (num_chunks<bits>() == 8) return from.chunks[index];
  if constexpr (bits == 4) {
    return turned_down<index / 4 * 4 - places>(from.chunks[index % 4]) & static_cast<std::uint8_t>(15 << places);
  } else {
    const ByteVector lower = turned_down<index / 4 * 4>(from.chunks[index % 2]);
    if constexpr (bits == 2) return lower & static_cast<std::uint8_t>(3 << places);
    // The third bit of a quad is as far up in its chunk as the quad's number.
    ByteVector third;
    if constexpr (index < 4) {
      third = turned_up<2 - index % 2>(from.chunks[2]);
    } else {
      third = turned_down<2 + index % 2>(from.chunks[2]);
    }
    return (lower & static_cast<std::uint8_t>(3 << places)) | (third & static_cast<std::uint8_t>(4 << places));
  }
}

// Sums for each token: of codes in their place and of those `most_places` up. Where there are none, of even and odd quads
// if an instruction waits long for the one before that adds to the same sum.
template <int bits>
constexpr int num_sums() {
  return most_places(bits) == 0 && !kWholeBytes ? 1 : 2;
}

template <int bits, int tokens, int index>
OPTGPTQ_INLINE void add_quads(const BlockChunks<bits>& from, const std::int8_t* codes,
                              BlockSums<bits> (&sums)[tokens][num_sums<bits>()]) {
  constexpr int which = most_places(bits) == 0 ? index % num_sums<bits>() : places_of<bits>(index) != 0;
  const ByteVector quad = placed_codes<bits, index>(from);
  for (int token = 0; token < tokens; ++token) {
    add_products<bits>(sums[token][which], quad, quad_at(codes + token * kBlockColumns, index));
  }
  if constexpr (index + 1 < kQuads) add_quads<bits, tokens, index + 1>(from, codes, sums);
}

// Some tokens: activations as `ProductInputs` has them, from the first of these tokens on.
struct TokenCodes {
  const std::int8_t* codes;
  const float* scales;
  const float* sums;
  std::int64_t num_tokens;   // from one block to the next
  std::int64_t bytes_ahead;  // as `ProductInputs` has it
};

// Add the products of a group's blocks.
template <int bits, int tokens>
OPTGPTQ_INLINE void add_blocks(const std::uint8_t* block_codes, const TokenCodes& of, std::int64_t num_blocks,
                               FloatVector (&products)[tokens][kParts]) {
  for (int part = 0; part < kParts; ++part) {
    const std::uint8_t* from = block_codes + part * OPTGPTQ_VECTOR_BYTES;
    for (std::int64_t block = 0; block < num_blocks; ++block) {
      if (part == 0) ask_ahead<num_chunks<bits>()>(from, of.bytes_ahead);
      BlockSums<bits> sums[tokens][num_sums<bits>()] = {};
      add_quads<bits, tokens, 0>(chunks_of<bits>(from), of.codes + block * of.num_tokens * kBlockColumns, sums);
      for (int token = 0; token < tokens; ++token) {
        IntVector sum = whole_sums<bits>(sums[token][0]);
        if constexpr (num_sums<bits>() == 2) sum += whole_sums<bits>(sums[token][1]) >> most_places(bits);
        const FloatVector scale = every(of.scales[block * of.num_tokens + token]);
        products[token][part] = fused(floats(sum), scale, products[token][part]);
      }
      from += num_chunks<bits>() * kChunk;
    }
  }
}

// The results of groups so far and one more; `at` counts tiles and groups.
template <int tokens>
OPTGPTQ_INLINE void add_group(const AffineCodes& weight, std::int64_t at, const float* sums,
                              const FloatVector (&products)[tokens][kParts], FloatVector (&results)[tokens][kParts]) {
  for (int part = 0; part < kParts; ++part) {
    const FloatVector scale = coefficients(weight.scales, weight.scale_type, at, part);
    const FloatVector zero = -zero_points(weight, at, part);
    for (int token = 0; token < tokens; ++token) {
      const FloatVector shifted = fused(zero, every(sums[token]), products[token][part]);
      results[token][part] = fused(shifted, scale, results[token][part]);
    }
  }
}

// Row tiles with few tokens, whose results stay in registers.
template <int bits, int tokens>
void few_tokens(const AffineCodes& weight, const ProductInputs& inputs, const ProductOutput& output,
                std::int64_t begin, std::int64_t end) {
  const std::int64_t group_blocks = inputs.num_blocks / inputs.num_groups;
  const std::uint8_t* codes = weight.codes + begin * inputs.num_blocks * block_bytes<bits>();
  for (std::int64_t tile = begin; tile < end; ++tile) {
    FloatVector results[tokens][kParts] = {};
    TokenCodes of{inputs.codes, inputs.scales, inputs.sums, tokens, inputs.bytes_ahead};
    for (std::int64_t group = 0; group < inputs.num_groups; ++group) {
      FloatVector products[tokens][kParts] = {};
      add_blocks<bits, tokens>(codes, of, group_blocks, products);
      add_group<tokens>(weight, tile * inputs.num_groups + group, of.sums, products, results);
      codes += group_blocks * block_bytes<bits>();
      of.codes += group_blocks * tokens * kBlockColumns;
      of.scales += group_blocks * tokens;
      of.sums += tokens;
    }
    for (int token = 0; token < tokens; ++token) {
      for (int part = 0; part < kParts; ++part) {
        put_results(results[token][part], output, token, tile * kTileRows + part * kLanes, weight.num_rows);
      }
    }
  }
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
