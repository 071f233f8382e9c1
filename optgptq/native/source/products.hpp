// Products of activations with a weight in codes: what is multiplied, how it lies in memory, and what each path offers.
//
// Rows of a weight lie in tiles of 16, columns in blocks of 32; every group of columns begins a new block, and all groups
// have equally many. A block of a tile is 8 quads of 4 columns; 64 bytes hold one byte for each row and column of a quad.
// Codes of 8 bits take one such chunk for each quad. Chunk `c` of codes of 4 bits holds quads `c` (low half of each byte)
// and `c + 4`; chunk `c` of codes of 2 bits quads `c`, `c + 2`, `c + 4`, `c + 6`; the chunk of codes of 1 bit all of them.
// Codes of 3 bits have the two chunks of their lower 2 bits, then the chunk of the third.
#pragma once

#include <cstdint>

namespace optgptq {

constexpr std::int64_t kTileRows = 16, kBlockColumns = 32, kQuads = 8, kChunk = 64;
// Types of activations and outputs, scales and zero points, as Python numbers them.
constexpr std::int64_t kFloat = 0, kBFloat16 = 1, kHalf = 2;
constexpr std::int64_t kCommonZero = 0, kByteZeros = 1, kShortZeros = 2;

// Activations of some tokens as codes of 8 bits with a scale for each block, columns in the order of the weight's. What is
// multiplied with one block of the weight lies together: rows a power of two apart would share a few lines of the cache.
struct ProductInputs {
  std::int8_t* codes;  // [blocks, tokens, 32]
  float* scales;       // [blocks, tokens]
  float* sums;         // [groups, tokens]: of all numbers of the group, as the codes stand for them
  std::int64_t num_tokens, num_blocks, num_groups;
  std::int64_t bytes_ahead;  // how far in front of its use the weight is asked for; 0: not at all
};

// Activations as they are.
struct ExactInputs {
  const float* rows;  // [tokens, blocks, 32]
  std::int64_t num_tokens;
  std::int64_t bytes_ahead;  // as `ProductInputs` has it
};

// Where activations come from: rows of `num_columns` numbers.
struct ProductRows {
  const void* numbers;
  const std::int64_t* column_order;  // which column each column of the weight takes; null: the same
  std::int64_t type, stride, num_columns;
};

// Codes on uniform grids: `(code - zero_point) * scale`.
struct AffineCodes {
  const std::uint8_t* codes;  // [tiles, blocks, chunks, 64]
  const void* scales;         // [tiles, groups, 16], float or half precision
  const void* zero_points;    // [tiles, groups, 16], bytes or shorts; not read where all are `zero_point`
  std::int64_t scale_type, zero_type, zero_point, bits;
  std::int64_t num_rows, num_blocks, num_groups;
};

struct ProductOutput {
  void* numbers;      // rows of `num_rows` numbers, one for each token
  const float* bias;  // [num_rows], or null
  std::int64_t type, stride;
};

// What one instruction set does; each function has the same bits on all of them.
struct ProductPath {
  // One token: `row` is work space for all columns with their filling.
  void (*quantize)(const ProductRows& rows, std::int64_t token, float* row, const ProductInputs& inputs);
  void (*widen)(const ProductRows& rows, std::int64_t token, float* row, std::int64_t num_blocks);
  // Row tiles from `begin` to before `end` with all tokens; for more than kFewTokens `results` is kResultsSpace numbers.
  void (*multiply)(const AffineCodes& weight, const ProductInputs& inputs, const ProductOutput& output,
                   std::int64_t begin, std::int64_t end, float* results);
  // The same with activations as they are.
  void (*exact)(const AffineCodes& weight, const ExactInputs& inputs, const ProductOutput& output,
                std::int64_t begin, std::int64_t end);
};

// Tokens whose results stay in registers on every path.
constexpr std::int64_t kFewTokens = 4;
// Tokens whose results are kept at a time.
constexpr std::int64_t kStripTokens = 256;
constexpr std::int64_t kResultsSpace = kStripTokens * kTileRows;

#if defined(__x86_64__)
namespace avx512vnni {
ProductPath product_path();
}
namespace avx512 {
ProductPath product_path();
}
namespace avx2 {
ProductPath product_path();
}
#endif
namespace portable {
ProductPath product_path();
}

}  // namespace optgptq
