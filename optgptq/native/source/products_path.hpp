// Products with codes on uniform grids: many tokens, and what an instruction set offers. Included once by each of them.
#pragma once

#include "products_exact.hpp"
#include "products_inputs.hpp"
#include "products_tile.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// A group of a tile with some tokens, whose results are kept in memory: [tokens, 16].
template <int bits, int tokens>
void add_to_results(const AffineCodes& weight, std::int64_t at, const std::uint8_t* codes, const TokenCodes& of,
                    std::int64_t num_blocks, float* kept) {
  FloatVector products[tokens][kParts] = {}, results[tokens][kParts];
  add_blocks<bits, tokens>(codes, of, num_blocks, products);
  for (int token = 0; token < tokens; ++token) {
    for (int part = 0; part < kParts; ++part) {
      results[token][part] = load_numbers(kept + token * kTileRows + part * kLanes);
    }
  }
  add_group<tokens>(weight, at, of.sums, products, results);
  for (int token = 0; token < tokens; ++token) {
    for (int part = 0; part < kParts; ++part) {
      store_numbers(results[token][part], kept + token * kTileRows + part * kLanes);
    }
  }
}

// How many tokens there are registers for.
constexpr std::int64_t kTokensAtOnce = OPTGPTQ_VECTOR_BYTES > 16 ? 6 : 4;
static_assert(kTokensAtOnce >= kFewTokens);
// Tokens from which codes of 3 bits are worth a byte each, and blocks of a group that lie in the nearest cache then. Codes
// of 2 and 4 bits leave their chunks as fast as bytes are read.
constexpr std::int64_t kSpreadTokens = 24, kSpreadBlocks = 32;

template <int bits>
OPTGPTQ_INLINE void add_some(std::int64_t num_tokens, const AffineCodes& weight, std::int64_t at,
                             const std::uint8_t* codes, const TokenCodes& of, std::int64_t num_blocks, float* kept) {
  switch (num_tokens) {
    case 1: return add_to_results<bits, 1>(weight, at, codes, of, num_blocks, kept);
    case 2: return add_to_results<bits, 2>(weight, at, codes, of, num_blocks, kept);
    case 3: return add_to_results<bits, 3>(weight, at, codes, of, num_blocks, kept);
    case 4: return add_to_results<bits, 4>(weight, at, codes, of, num_blocks, kept);
#if OPTGPTQ_VECTOR_BYTES > 16
    case 5: return add_to_results<bits, 5>(weight, at, codes, of, num_blocks, kept);
    default: return add_to_results<bits, 6>(weight, at, codes, of, num_blocks, kept);
#endif
  }
}

template <int bits, int index>
OPTGPTQ_INLINE void spread_quads(const std::uint8_t* block, std::uint8_t* bytes) {
  for (int part = 0; part < kParts; ++part) {
    const ByteVector quad = quad_codes<bits, index>(block, part);
    __builtin_memcpy(bytes + index * kChunk + part * OPTGPTQ_VECTOR_BYTES, &quad, sizeof quad);
  }
  if constexpr (index + 1 < kQuads) spread_quads<bits, index + 1>(block, bytes);
}

template <int bits>
void spread_blocks(const std::uint8_t* codes, std::int64_t num_blocks, std::uint8_t* bytes) {
  for (std::int64_t block = 0; block < num_blocks; ++block) {
    spread_quads<bits, 0>(codes, bytes);
    codes += block_bytes<bits>();
    bytes += kQuads * kChunk;
  }
}

// One group of one tile with all tokens of a strip, in pieces of equal size.
template <int bits>
void add_pieces(const AffineCodes& weight, const ProductInputs& inputs, std::int64_t tile, std::int64_t group,
                const std::uint8_t* codes, std::int64_t first_token, std::int64_t num_tokens, std::int64_t ahead,
                float* results) {
  const std::int64_t group_blocks = inputs.num_blocks / inputs.num_groups;
  for (std::int64_t done = 0; done < num_tokens;) {
    const std::int64_t left = num_tokens - done, pieces = (left + kTokensAtOnce - 1) / kTokensAtOnce;
    const std::int64_t tokens = (left + pieces - 1) / pieces, first = first_token + done;
    const std::int64_t at = group * group_blocks * inputs.num_tokens + first;
    const TokenCodes of{inputs.codes + at * kBlockColumns, inputs.scales + at,
                        inputs.sums + group * inputs.num_tokens + first, inputs.num_tokens,
                        done == 0 ? ahead : 0};
    add_some<bits>(tokens, weight, tile * inputs.num_groups + group, codes, of, group_blocks, results);
    results += tokens * kTileRows;
    done += tokens;
  }
}

// A tile with up to kStripTokens tokens: each group's codes are read once, and many times from the nearest cache.
template <int bits>
void multiply_strip(const AffineCodes& weight, const ProductInputs& inputs, std::int64_t tile, std::int64_t first_token,
                    std::int64_t num_tokens, float* results) {
  const std::int64_t group_blocks = inputs.num_blocks / inputs.num_groups;
  const bool spreads = bits == 3 && num_tokens >= kSpreadTokens && group_blocks <= kSpreadBlocks;
  alignas(64) std::uint8_t bytes[bits == 3 ? kSpreadBlocks * kQuads * kChunk : 1];
  for (std::int64_t index = 0; index < num_tokens * kTileRows; ++index) results[index] = 0.0f;
  const std::uint8_t* codes = weight.codes + tile * inputs.num_blocks * block_bytes<bits>();
  for (std::int64_t group = 0; group < inputs.num_groups; ++group) {
    if (spreads) {
      spread_blocks<bits>(codes, group_blocks, bytes);
      add_pieces<kSpread>(weight, inputs, tile, group, bytes, first_token, num_tokens, 0, results);
    } else {
      add_pieces<bits>(weight, inputs, tile, group, codes, first_token, num_tokens, inputs.bytes_ahead, results);
    }
    codes += group_blocks * block_bytes<bits>();
  }
}

template <int bits>
void many_tokens(const AffineCodes& weight, const ProductInputs& inputs, const ProductOutput& output,
                 std::int64_t begin, std::int64_t end, float* results) {
  for (std::int64_t first = 0; first < inputs.num_tokens; first += kStripTokens) {
    const std::int64_t left = inputs.num_tokens - first, num_tokens = left < kStripTokens ? left : kStripTokens;
    for (std::int64_t tile = begin; tile < end; ++tile) {
      multiply_strip<bits>(weight, inputs, tile, first, num_tokens, results);
      for (std::int64_t token = 0; token < num_tokens; ++token) {
        for (int part = 0; part < kParts; ++part) {
          const FloatVector numbers = load_numbers(results + token * kTileRows + part * kLanes);
          put_results(numbers, output, first + token, tile * kTileRows + part * kLanes, weight.num_rows);
        }
      }
    }
  }
}

template <int bits>
void multiply_tiles(const AffineCodes& weight, const ProductInputs& inputs, const ProductOutput& output,
                    std::int64_t begin, std::int64_t end, float* results) {
  switch (inputs.num_tokens) {
    case 1: return few_tokens<bits, 1>(weight, inputs, output, begin, end);
    case 2: return few_tokens<bits, 2>(weight, inputs, output, begin, end);
    case 3: return few_tokens<bits, 3>(weight, inputs, output, begin, end);
    case 4: return few_tokens<bits, 4>(weight, inputs, output, begin, end);
    default: return many_tokens<bits>(weight, inputs, output, begin, end, results);
  }
}

void multiply(const AffineCodes& weight, const ProductInputs& inputs, const ProductOutput& output, std::int64_t begin,
              std::int64_t end, float* results) {
  switch (weight.bits) {
    case 2: return multiply_tiles<2>(weight, inputs, output, begin, end, results);
    case 3: return multiply_tiles<3>(weight, inputs, output, begin, end, results);
    case 4: return multiply_tiles<4>(weight, inputs, output, begin, end, results);
    default: return multiply_tiles<8>(weight, inputs, output, begin, end, results);
  }
}

}  // namespace

ProductPath product_path() { return {quantize, widen, multiply, exact}; }

}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
