// Products of activations with a weight in binary coding: `offset + sum over planes of coefficient * (2 * bit - 1)`.
//
// Bit `p` of a code is the bit of plane `p`; codes of as many bits as there are planes lie as in products.hpp.
#pragma once

#include "products.hpp"

namespace optgptq {

struct BinaryCodes {
  const std::uint8_t* codes;  // [tiles, blocks, chunks, 64]
  const void* alphas;         // coefficients [tiles, groups, planes, 16], float or half precision
  const void* offsets;        // [tiles, groups, 16], of the same type
  std::int64_t scale_type, num_planes;
  std::int64_t num_rows, num_blocks, num_groups;
};

// What one instruction set does; each function has the same bits on all of them. Activations are those of `ProductPath`.
struct BinaryProductPath {
  // Row tiles from `begin` to before `end` with all tokens; for more than kFewTokens `results` is kResultsSpace numbers.
  void (*multiply)(const BinaryCodes& weight, const ProductInputs& inputs, const ProductOutput& output,
                   std::int64_t begin, std::int64_t end, float* results);
  // The same with activations as they are.
  void (*exact)(const BinaryCodes& weight, const ExactInputs& inputs, const ProductOutput& output,
                std::int64_t begin, std::int64_t end);
};

#if defined(__x86_64__)
namespace avx512vnni {
BinaryProductPath binary_product_path();
}
namespace avx512 {
BinaryProductPath binary_product_path();
}
namespace avx2 {
BinaryProductPath binary_product_path();
}
#endif
namespace portable {
BinaryProductPath binary_product_path();
}

}  // namespace optgptq
