// Products of activations as they are with codes on uniform grids, a tile of 16 rows at a time.
// Included once by each instruction set.
#pragma once

#include "products_codes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

template <int bits, int tokens, int index>
OPTGPTQ_INLINE void add_exact_quads(const std::uint8_t* block, const float* const* rows,
                                    const FloatVector (&zero)[kParts], FloatVector (&sums)[tokens][kParts]) {
  for (int part = 0; part < kParts; ++part) {
    const IntVector words = (IntVector)quad_codes<bits, index>(block, part);
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) {
      const FloatVector steps = floats((words >> (8 * column)) & 255) - zero[part];
      for (int token = 0; token < tokens; ++token) {
        sums[token][part] = fused(steps, every(rows[token][4 * index + column]), sums[token][part]);
      }
    }
  }
  if constexpr (index + 1 < kQuads) add_exact_quads<bits, tokens, index + 1>(block, rows, zero, sums);
}

template <int bits, int tokens>
void exact_tiles(const AffineCodes& weight, const float* rows, const ProductOutput& output, std::int64_t first_token,
                 std::int64_t begin, std::int64_t end) {
  const std::int64_t group_blocks = weight.num_blocks / weight.num_groups;
  for (std::int64_t tile = begin; tile < end; ++tile) {
    FloatVector results[tokens][kParts] = {};
    const std::uint8_t* block_codes = weight.codes + tile * weight.num_blocks * block_bytes<bits>();
    for (std::int64_t group = 0; group < weight.num_groups; ++group) {
      const std::int64_t at = tile * weight.num_groups + group;
      FloatVector zero[kParts], sums[tokens][kParts] = {};
      for (int part = 0; part < kParts; ++part) zero[part] = zero_points(weight, at, part);
      for (std::int64_t block = group * group_blocks; block < (group + 1) * group_blocks; ++block) {
        const float* of_block[tokens];
        for (int token = 0; token < tokens; ++token) {
          of_block[token] = rows + ((first_token + token) * weight.num_blocks + block) * kBlockColumns;
        }
        add_exact_quads<bits, tokens, 0>(block_codes, of_block, zero, sums);
        block_codes += block_bytes<bits>();
      }
      for (int part = 0; part < kParts; ++part) {
        const FloatVector scale = coefficients(weight.scales, weight.scale_type, at, part);
        for (int token = 0; token < tokens; ++token) {
          results[token][part] = fused(sums[token][part], scale, results[token][part]);
        }
      }
    }
    for (int token = 0; token < tokens; ++token) {
      for (int part = 0; part < kParts; ++part) {
        const std::int64_t row = tile * kTileRows + part * kLanes;
        put_results(results[token][part], output, first_token + token, row, weight.num_rows);
      }
    }
  }
}

template <int bits>
void exact_tokens(const AffineCodes& weight, const float* rows, std::int64_t num_tokens, const ProductOutput& output,
                  std::int64_t begin, std::int64_t end) {
  std::int64_t token = 0;
  for (; token + 4 <= num_tokens; token += 4) exact_tiles<bits, 4>(weight, rows, output, token, begin, end);
  for (; token < num_tokens; ++token) exact_tiles<bits, 1>(weight, rows, output, token, begin, end);
}

void exact(const AffineCodes& weight, const float* rows, std::int64_t num_tokens, const ProductOutput& output,
           std::int64_t begin, std::int64_t end) {
  switch (weight.bits) {
    case 2: return exact_tokens<2>(weight, rows, num_tokens, output, begin, end);
    case 3: return exact_tokens<3>(weight, rows, num_tokens, output, begin, end);
    case 4: return exact_tokens<4>(weight, rows, num_tokens, output, begin, end);
    default: return exact_tokens<8>(weight, rows, num_tokens, output, begin, end);
  }
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
