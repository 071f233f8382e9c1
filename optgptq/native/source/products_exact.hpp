// Products of activations as they are with codes on uniform grids, a tile of 16 rows at a time.
// Included once by each instruction set.
#pragma once

#include "products_codes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// So many tiles at once: the sums of a row wait for each other, those of other rows do not.
constexpr int tiles_at_once(int tokens) { return tokens == 1 && kParts == 1 ? 2 : 1; }

template <int tokens, int tiles>
struct ExactSums {
  FloatVector of[tiles][tokens][kParts];
};

template <int bits, int tokens, int tiles, int index>
OPTGPTQ_INLINE void add_exact_quads(const std::uint8_t* block, std::int64_t tile_bytes, const float* const* rows,
                                    const FloatVector (&zero)[tiles][kParts], ExactSums<tokens, tiles>& sums) {
  for (int part = 0; part < kParts; ++part) {
    IntVector words[tiles];
    for (int tile = 0; tile < tiles; ++tile) {
      words[tile] = (IntVector)quad_codes<bits, index>(block + tile * tile_bytes, part);
    }
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) {
      for (int tile = 0; tile < tiles; ++tile) {
        const FloatVector steps = floats((words[tile] >> (8 * column)) & 255) - zero[tile][part];
        for (int token = 0; token < tokens; ++token) {
          FloatVector& sum = sums.of[tile][token][part];
          sum = fused(steps, every(rows[token][4 * index + column]), sum);
        }
      }
    }
  }
  if constexpr (index + 1 < kQuads) add_exact_quads<bits, tokens, tiles, index + 1>(block, tile_bytes, rows, zero, sums);
}

// Some tokens and tiles, from the first ones on.
template <int bits, int tokens, int tiles>
void exact_tiles(const AffineCodes& weight, const ExactInputs& inputs, const ProductOutput& output,
                 std::int64_t first_token, std::int64_t first_tile) {
  const std::int64_t group_blocks = weight.num_blocks / weight.num_groups;
  const std::int64_t tile_bytes = weight.num_blocks * block_bytes<bits>();
  const std::uint8_t* codes = weight.codes + first_tile * tile_bytes;
  const std::int64_t ahead = first_token == 0 ? inputs.bytes_ahead : 0;
  ExactSums<tokens, tiles> results = {};
  for (std::int64_t group = 0; group < weight.num_groups; ++group) {
    const std::int64_t at = first_tile * weight.num_groups + group;
    FloatVector zero[tiles][kParts];
    for (int tile = 0; tile < tiles; ++tile) {
      for (int part = 0; part < kParts; ++part) zero[tile][part] = zero_points(weight, at + tile * weight.num_groups, part);
    }
    ExactSums<tokens, tiles> sums = {};
    for (std::int64_t block = group * group_blocks; block < (group + 1) * group_blocks; ++block) {
      const float* of_block[tokens];
      for (int token = 0; token < tokens; ++token) {
        of_block[token] = inputs.rows + ((first_token + token) * weight.num_blocks + block) * kBlockColumns;
      }
      for (int tile = 0; tile < tiles; ++tile) ask_ahead<bits>(codes + tile * tile_bytes, ahead);
      add_exact_quads<bits, tokens, tiles, 0>(codes, tile_bytes, of_block, zero, sums);
      codes += block_bytes<bits>();
    }
    for (int tile = 0; tile < tiles; ++tile) {
      for (int part = 0; part < kParts; ++part) {
        const FloatVector scale = coefficients(weight.scales, weight.scale_type, at + tile * weight.num_groups, part);
        for (int token = 0; token < tokens; ++token) {
          FloatVector& result = results.of[tile][token][part];
          result = fused(sums.of[tile][token][part], scale, result);
        }
      }
    }
  }
  for (int tile = 0; tile < tiles; ++tile) {
    for (int token = 0; token < tokens; ++token) {
      for (int part = 0; part < kParts; ++part) {
        const std::int64_t row = (first_tile + tile) * kTileRows + part * kLanes;
        put_results(results.of[tile][token][part], output, first_token + token, row, weight.num_rows);
      }
    }
  }
}

template <int bits, int tokens>
void exact_rows(const AffineCodes& weight, const ExactInputs& inputs, const ProductOutput& output,
                std::int64_t first_token, std::int64_t begin, std::int64_t end) {
  constexpr int tiles = tiles_at_once(tokens);
  std::int64_t tile = begin;
  for (; tile + tiles <= end; tile += tiles) exact_tiles<bits, tokens, tiles>(weight, inputs, output, first_token, tile);
  for (; tile < end; ++tile) exact_tiles<bits, tokens, 1>(weight, inputs, output, first_token, tile);
}

template <int bits>
void exact_tokens(const AffineCodes& weight, const ExactInputs& inputs, const ProductOutput& output,
                  std::int64_t begin, std::int64_t end) {
  std::int64_t token = 0;
  for (; token + 4 <= inputs.num_tokens; token += 4) exact_rows<bits, 4>(weight, inputs, output, token, begin, end);
  for (; token < inputs.num_tokens; ++token) exact_rows<bits, 1>(weight, inputs, output, token, begin, end);
}

void exact(const AffineCodes& weight, const ExactInputs& inputs, const ProductOutput& output, std::int64_t begin,
           std::int64_t end) {
  switch (weight.bits) {
    case 2: return exact_tokens<2>(weight, inputs, output, begin, end);
    case 3: return exact_tokens<3>(weight, inputs, output, begin, end);
    case 4: return exact_tokens<4>(weight, inputs, output, begin, end);
    default: return exact_tokens<8>(weight, inputs, output, begin, end);
  }
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
