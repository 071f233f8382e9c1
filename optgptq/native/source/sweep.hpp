// What one call for long rows is told: the gradient of their errors, their scales once more, or sweeps over their codes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace optgptq {

constexpr std::int64_t kGradient = 0, kRefit = 1, kSweeps = 2;

// The layout is mirrored by `optgptq/native/sweep.py`. Matrices are dense, rows of the weight are rows. All numbers are
// float or all are double, but for `gain`. Groups are contiguous; the last one may be shorter.
struct SweepCall {
  const void* moment;   // [I, I], symmetric
  void* gradient;       // [R, I], error times moment; changed by sweeps; before `kGradient` the error itself
  void* steps;          // [R, I], code minus zero point; changed by sweeps
  void* scale;          // [R, G]; changed by a refit
  const void* lowest;   // [R, G], smallest step
  const void* highest;  // [R, G], largest step
  double* loss;         // [R], what each row loses, or loses less after a refit; sweeps leave it alone
  std::int64_t num_columns;
  std::int64_t num_rows;
  std::int64_t group_size;
  std::int64_t action;
  std::int64_t code_sweeps;
  std::int64_t changed;  // result: whether a step or a scale is another one
};

inline std::int64_t num_groups(const SweepCall& call) {
  return (call.num_columns + call.group_size - 1) / call.group_size;
}

// One instruction set: what it does with some rows of the call; all return whether anything changed. Where lanes are
// rows, a tile has one vector of them, or `wide`.
template <class T>
struct SweepPath {
  std::int64_t lanes;
  std::int64_t wide;
  std::size_t (*tile_bytes)(const SweepCall& call, std::int64_t vectors);
  bool (*gradient)(const SweepCall& call, void* scratch, std::int64_t begin, std::int64_t vectors);
  bool (*refit)(const SweepCall& call, void* scratch, std::int64_t begin, std::int64_t vectors);
  std::size_t (*sweep_bytes)(const SweepCall& call, std::int64_t num_rows);
  bool (*sweep)(const SweepCall& call, void* scratch, std::int64_t begin, std::int64_t num_rows);
};

namespace portable {
SweepPath<float> sweep_float();
SweepPath<double> sweep_double();
}  // namespace portable
namespace avx2 {
SweepPath<float> sweep_float();
SweepPath<double> sweep_double();
}  // namespace avx2
namespace avx512 {
SweepPath<float> sweep_float();
SweepPath<double> sweep_double();
}  // namespace avx512

}  // namespace optgptq
