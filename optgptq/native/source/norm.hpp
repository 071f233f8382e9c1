// RMS norm of rows of bfloat16 numbers.
#pragma once

#include <cstdint>

namespace optgptq {

// [rows, size], rows one after the other; `weight` has `size` numbers.
struct NormCall {
  const std::uint16_t* input;
  const std::uint16_t* weight;
  std::uint16_t* output;
  std::int64_t num_rows, size;
  double epsilon;
};

// The same bits for any number of threads. Sums are float, in 16 lanes.
void rms_norm_bfloat16(const NormCall& call, std::int64_t num_threads);

}  // namespace optgptq
