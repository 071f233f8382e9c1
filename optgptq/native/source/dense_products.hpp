// Products of bfloat16 activations with a dense bfloat16 weight that lies in tiles.
//
// Rows of the weight in groups of 32, columns in pairs: 32 pairs of neighbouring columns, one for each row, are side by
// side, so that a group is read in one stream and lanes are rows. The last group and an odd last column are filled with
// zeros.
#pragma once

#include <cstdint>

#include "bfloat16_pairs.hpp"

namespace optgptq {

struct DenseWeight {
  const std::uint16_t* numbers;  // [O, I]
  std::int64_t stride;           // numbers from one row to the next
  std::int64_t num_rows, num_columns;
};

struct DenseCall {
  const std::uint16_t* inputs;  // [T, I]
  std::int64_t input_stride;    // numbers from one token to the next
  const std::uint32_t* tiles;   // [groups of 32 rows, pairs of columns, 32]
  const float* bias;            // [O], or null
  std::uint16_t* output;        // [T, O], without gaps
  std::int64_t num_tokens, num_rows, num_columns;
};

// Numbers of 32 bits that the tiles of a weight take.
std::int64_t dense_tile_numbers(std::int64_t num_rows, std::int64_t num_columns);

// Both return false where the processor lacks the instruction.
bool pack_dense(const DenseWeight& weight, std::uint32_t* tiles, std::int64_t num_threads);

// Each number of the output is one float32 sum over the columns in their order, rounded once: the same bits in any batch
// and for any number of threads. Numbers below the smallest normal one count as zero.
bool multiply_dense(const DenseCall& call, PairWay way, std::int64_t num_threads);

}  // namespace optgptq
