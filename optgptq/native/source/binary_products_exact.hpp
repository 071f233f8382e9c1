// Products of activations as they are with a weight in binary coding: each weight is made as its definition says.
// Included once by each instruction set.
#pragma once

#include "binary_products.hpp"
#include "products_codes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

typedef std::uint32_t WordVector __attribute__((vector_size(OPTGPTQ_VECTOR_BYTES)));

// Coefficients of a group with their signs turned, and the offset.
template <int planes>
struct PlaneLevels {
  FloatVector turned[planes], offset;
};

// The weights of one column of a quad: the bit of a plane turns the sign of its coefficient.
template <int planes, int column>
OPTGPTQ_INLINE FloatVector levels_of(const PlaneLevels<planes>& of, WordVector words) {
  FloatVector level = of.offset;
  for (int plane = 0; plane < planes; ++plane) {
    const WordVector sign = (words << (31 - 8 * column - plane)) & 0x80000000u;
    level += (FloatVector)((WordVector)of.turned[plane] ^ sign);
  }
  return level;
}

template <int planes, int tokens, int index, int column>
OPTGPTQ_INLINE void add_exact_columns(WordVector words, const float* const* rows, const PlaneLevels<planes>& of,
                                      FloatVector (&sums)[tokens]) {
  const FloatVector levels = levels_of<planes, column>(of, words);
  for (int token = 0; token < tokens; ++token) {
    sums[token] = fused(levels, every(rows[token][4 * index + column]), sums[token]);
  }
  if constexpr (column < 3) add_exact_columns<planes, tokens, index, column + 1>(words, rows, of, sums);
}

template <int planes, int tokens, int index>
OPTGPTQ_INLINE void add_exact_planes(const std::uint8_t* block, int part, const float* const* rows,
                                     const PlaneLevels<planes>& of, FloatVector (&sums)[tokens]) {
  add_exact_columns<planes, tokens, index, 0>((WordVector)quad_codes<planes, index>(block, part), rows, of, sums);
  if constexpr (index + 1 < kQuads) add_exact_planes<planes, tokens, index + 1>(block, part, rows, of, sums);
}

// Some tokens and the rows of vector `part` of a tile.
template <int planes, int tokens>
void exact_part(const BinaryCodes& weight, const ExactInputs& inputs, const ProductOutput& output,
                std::int64_t first_token, std::int64_t tile, int part) {
  const std::int64_t group_blocks = weight.num_blocks / weight.num_groups;
  const std::uint8_t* codes = weight.codes + tile * weight.num_blocks * block_bytes<planes>();
  FloatVector sums[tokens] = {};
  for (std::int64_t group = 0; group < weight.num_groups; ++group) {
    const std::int64_t at = tile * weight.num_groups + group;
    PlaneLevels<planes> of;
    of.offset = coefficients(weight.offsets, weight.scale_type, at, part);
    for (int plane = 0; plane < planes; ++plane) {
      of.turned[plane] = -coefficients(weight.alphas, weight.scale_type, at * planes + plane, part);
    }
    for (std::int64_t block = group * group_blocks; block < (group + 1) * group_blocks; ++block) {
      const float* of_block[tokens];
      for (int token = 0; token < tokens; ++token) {
        of_block[token] = inputs.rows + ((first_token + token) * weight.num_blocks + block) * kBlockColumns;
      }
      if (first_token == 0 && part == 0) ask_ahead<planes>(codes, inputs.bytes_ahead);
      add_exact_planes<planes, tokens, 0>(codes, part, of_block, of, sums);
      codes += block_bytes<planes>();
    }
  }
  for (int token = 0; token < tokens; ++token) {
    put_results(sums[token], output, first_token + token, tile * kTileRows + part * kLanes, weight.num_rows);
  }
}

template <int planes>
void exact_planes(const BinaryCodes& weight, const ExactInputs& inputs, const ProductOutput& output,
                  std::int64_t begin, std::int64_t end) {
  for (std::int64_t tile = begin; tile < end; ++tile) {
    for (int part = 0; part < kParts; ++part) {
      std::int64_t token = 0;
      for (; token + 4 <= inputs.num_tokens; token += 4) exact_part<planes, 4>(weight, inputs, output, token, tile, part);
      for (; token < inputs.num_tokens; ++token) exact_part<planes, 1>(weight, inputs, output, token, tile, part);
    }
  }
}

void exact_binary(const BinaryCodes& weight, const ExactInputs& inputs, const ProductOutput& output,
                  std::int64_t begin, std::int64_t end) {
  switch (weight.num_planes) {
    case 1: return exact_planes<1>(weight, inputs, output, begin, end);
    case 2: return exact_planes<2>(weight, inputs, output, begin, end);
    case 3: return exact_planes<3>(weight, inputs, output, begin, end);
    default: return exact_planes<4>(weight, inputs, output, begin, end);
  }
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
