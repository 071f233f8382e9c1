// Sums of x y^T over tokens in bfloat16.
#pragma once

#include <cstdint>

#include "bfloat16_pairs.hpp"

namespace optgptq {

// [T, columns]; rows are `stride` numbers apart.
struct Bfloat16Matrix {
  const std::uint16_t* numbers;
  std::int64_t stride, num_columns;
};

// Add `left^T right` to `sum`, float. Without numbers on the right it is `left^T left`: blocks on and above the diagonal
// receive it, and those below stay as they are. Returns false where the processor lacks the instruction.
bool add_bfloat16_products(
    const Bfloat16Matrix& left, const Bfloat16Matrix& right, std::int64_t num_tokens, float* sum,
    std::int64_t sum_stride, PairWay way, std::int64_t num_threads);

}  // namespace optgptq
