// What one call for the refinement of some rows is told.
#pragma once

#include <cstddef>
#include <cstdint>

namespace optgptq {

// The layout is mirrored by `optgptq/native/refine.py`. Matrices are dense, rows of the weight are their columns. All
// numbers are float or all are double. Groups are contiguous; the last one may be shorter.
struct RefineCall {
  const void* target;   // [I, R]
  const void* moment;   // [I, I], symmetric
  void* steps;          // [I, R], code minus zero point; changed
  void* scale;          // [G, R]; changed
  const void* lowest;   // [G, R], smallest step
  const void* highest;  // [G, R], largest step
  std::int64_t num_columns;
  std::int64_t num_rows;
  std::int64_t group_size;
  std::int64_t scale_refit;
  std::int64_t code_sweeps;
  std::int64_t rounds;
  std::int64_t changed;  // result: whether a step or a scale is another one
};

inline std::int64_t num_groups(const RefineCall& call) {
  return (call.num_columns + call.group_size - 1) / call.group_size;
}

// One instruction set. A tile has one vector of rows, or `wide` of them.
template <class T>
struct RefinePath {
  std::int64_t lanes;
  std::int64_t wide;
  std::size_t (*scratch_bytes)(const RefineCall& call, std::int64_t vectors);
  // Refines rows from `begin` on and returns whether anything changed; `scratch` begins at a multiple of 64 bytes.
  bool (*refine_tile)(const RefineCall& call, void* scratch, std::int64_t begin, std::int64_t vectors);
};

namespace portable {
RefinePath<float> refine_float();
RefinePath<double> refine_double();
}  // namespace portable
namespace avx2 {
RefinePath<float> refine_float();
RefinePath<double> refine_double();
}  // namespace avx2
namespace avx512 {
RefinePath<float> refine_float();
RefinePath<double> refine_double();
}  // namespace avx512

}  // namespace optgptq
