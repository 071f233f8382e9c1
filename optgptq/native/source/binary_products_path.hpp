// Products with weights in binary coding: many tokens, and what an instruction set offers. Included once by each of them.
#pragma once

#include "binary_products_exact.hpp"
#include "binary_products_tile.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// A group of a tile with some tokens, whose results are kept in memory: [tokens, 16].
template <int planes, int tokens>
void add_binary_results(const BinaryCodes& weight, std::int64_t at, const std::uint8_t* codes, const BinaryTokens& of,
                        float* kept) {
  for (int part = 0; part < kParts; ++part) {
    FloatVector results[tokens];
    for (int token = 0; token < tokens; ++token) {
      results[token] = load_numbers(kept + token * kTileRows + part * kLanes);
    }
    add_group_by_planes<planes, tokens>(weight, at, codes, of, part, results);
    for (int token = 0; token < tokens; ++token) {
      store_numbers(results[token], kept + token * kTileRows + part * kLanes);
    }
  }
}

// How many tokens there are registers for.
constexpr std::int64_t kBinaryTokensAtOnce = OPTGPTQ_VECTOR_BYTES == 64 ? 8 : 4;

template <int planes>
OPTGPTQ_INLINE void add_binary_some(std::int64_t num_tokens, const BinaryCodes& weight, std::int64_t at,
                                    const std::uint8_t* codes, const BinaryTokens& of, float* kept) {
  switch (num_tokens) {
    case 1: return add_binary_results<planes, 1>(weight, at, codes, of, kept);
    case 2: return add_binary_results<planes, 2>(weight, at, codes, of, kept);
    case 3: return add_binary_results<planes, 3>(weight, at, codes, of, kept);
    case 4: return add_binary_results<planes, 4>(weight, at, codes, of, kept);
#if OPTGPTQ_VECTOR_BYTES == 64
    case 5: return add_binary_results<planes, 5>(weight, at, codes, of, kept);
    case 6: return add_binary_results<planes, 6>(weight, at, codes, of, kept);
    case 7: return add_binary_results<planes, 7>(weight, at, codes, of, kept);
    default: return add_binary_results<planes, 8>(weight, at, codes, of, kept);
#endif
  }
}

// A tile with up to kStripTokens tokens: each group's codes are read once, and many times from the nearest cache.
template <int planes>
void multiply_binary_strip(const BinaryCodes& weight, const ProductInputs& inputs, std::int64_t tile,
                           std::int64_t first_token, std::int64_t num_tokens, float* results) {
  const std::int64_t group_blocks = inputs.num_blocks / inputs.num_groups;
  for (std::int64_t index = 0; index < num_tokens * kTileRows; ++index) results[index] = 0.0f;
  const std::uint8_t* codes = weight.codes + tile * inputs.num_blocks * block_bytes<planes>();
  for (std::int64_t group = 0; group < inputs.num_groups; ++group) {
    for (std::int64_t done = 0; done < num_tokens;) {
      const std::int64_t left = num_tokens - done, pieces = (left + kBinaryTokensAtOnce - 1) / kBinaryTokensAtOnce;
      const std::int64_t tokens = (left + pieces - 1) / pieces, first = first_token + done;
      const std::int64_t at = group * group_blocks * inputs.num_tokens + first;
      const BinaryTokens of{inputs.codes + at * kBlockColumns, inputs.scales + at,
                            inputs.sums + group * inputs.num_tokens + first, inputs.num_tokens,
                            done == 0 ? inputs.bytes_ahead : 0};
      add_binary_some<planes>(tokens, weight, tile * inputs.num_groups + group, codes, of, results + done * kTileRows);
      done += tokens;
    }
    codes += group_blocks * block_bytes<planes>();
  }
}

template <int planes>
void many_binary_tokens(const BinaryCodes& weight, const ProductInputs& inputs, const ProductOutput& output,
                        std::int64_t begin, std::int64_t end, float* results) {
  for (std::int64_t first = 0; first < inputs.num_tokens; first += kStripTokens) {
    const std::int64_t left = inputs.num_tokens - first, num_tokens = left < kStripTokens ? left : kStripTokens;
    for (std::int64_t tile = begin; tile < end; ++tile) {
      multiply_binary_strip<planes>(weight, inputs, tile, first, num_tokens, results);
      for (std::int64_t token = 0; token < num_tokens; ++token) {
        for (int part = 0; part < kParts; ++part) {
          const FloatVector numbers = load_numbers(results + token * kTileRows + part * kLanes);
          put_results(numbers, output, first + token, tile * kTileRows + part * kLanes, weight.num_rows);
        }
      }
    }
  }
}

template <int planes>
void multiply_planes(const BinaryCodes& weight, const ProductInputs& inputs, const ProductOutput& output,
                     std::int64_t begin, std::int64_t end, float* results) {
  switch (inputs.num_tokens) {
    case 1: return few_binary_tokens<planes, 1>(weight, inputs, output, begin, end);
    case 2: return few_binary_tokens<planes, 2>(weight, inputs, output, begin, end);
    case 3: return few_binary_tokens<planes, 3>(weight, inputs, output, begin, end);
    case 4: return few_binary_tokens<planes, 4>(weight, inputs, output, begin, end);
    default: return many_binary_tokens<planes>(weight, inputs, output, begin, end, results);
  }
}

void multiply_binary(const BinaryCodes& weight, const ProductInputs& inputs, const ProductOutput& output,
                     std::int64_t begin, std::int64_t end, float* results) {
  switch (weight.num_planes) {
    case 1: return multiply_planes<1>(weight, inputs, output, begin, end, results);
    case 2: return multiply_planes<2>(weight, inputs, output, begin, end, results);
    case 3: return multiply_planes<3>(weight, inputs, output, begin, end, results);
    default: return multiply_planes<4>(weight, inputs, output, begin, end, results);
  }
}

}  // namespace

BinaryProductPath binary_product_path() { return {multiply_binary, exact_binary}; }

}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
