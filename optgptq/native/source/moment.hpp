// Sums of x x^T over tokens in bfloat16.
#pragma once

#include <cstdint>

namespace optgptq {

// `sum` is float [I, I]; blocks on and above the diagonal receive `X^T X`, those below it stay as they are.
// `inputs` is bfloat16 [T, I]. Returns false where the processor lacks the instruction.
bool add_bfloat16_moment(
    const std::uint16_t* inputs, std::int64_t inputs_stride, std::int64_t num_tokens, std::int64_t num_columns,
    float* sum, std::int64_t sum_stride, std::int64_t num_threads);

bool has_bfloat16_products();

}  // namespace optgptq
