// What lies between the products of a decoder layer: norms with residual sums, gated activations, rotary positions.
// The layout of the records is mirrored by `optgptq/native/leaves.py` and `joint_attention.py`.
#pragma once

#include <cstdint>

#include "paged_attention.hpp"

namespace optgptq {

// Rows one after the other.
struct SumNormCall {
  void* input;           // [rows, size]; becomes the rounded sum where there is a residual
  const void* residual;  // [rows, size], or null
  const void* weight;    // [size], or null
  void* output;          // [rows, size]
  std::int64_t num_rows, size;
  NumberType type, weight_type;
  double epsilon;
};

enum class Gate : std::int64_t { kSilu = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kQuickGelu = 4 };

struct GatedCall {
  const void* gate;  // [rows, size], `gate_stride` numbers from row to row
  const void* up;    // likewise
  void* output;      // [rows, size], nothing between
  std::int64_t num_rows, size, gate_stride, up_stride;
  NumberType type;
  Gate kind;
};

// A random number per row inverts the cumulative distribution of the row's numbers.
struct DrawCall {
  const float* numbers;       // [rows, size]
  const float* greatest;      // [rows]
  const double* temperature;  // [rows]
  const double* uniform;      // [rows], of [0, 1)
  std::int64_t num_rows, size;
  double scale;  // weight of the greatest
};

// What all layers share that have the same pages and the same rotary table.
struct JointStep {
  PagedSequences sequences;
  const std::int64_t* slot;  // [T]
  const float* cosine;       // [T, half]; null where nothing is rotated
  const float* sine;
  std::int64_t half, num_tokens;
  float* heads;     // [T, N + 2 K, D], work space
  float* attended;  // [T, N, D], work space
};

// Queries, keys and values of one layer as its joint projection gives them: heads of queries, of keys, of values.
struct JointCall {
  const JointStep* step;
  Pages pages;
  ScoreRule rule;
  const void* query_weight;  // [D] of a norm of every head, or null
  const void* key_weight;
  const void* joint;  // [T, (N + 2 K) D], `token_stride` numbers from token to token
  void* output;       // [T, N D], nothing between
  std::int64_t token_stride, num_heads;
  NumberType type, weight_type;
  double epsilon;
};

// One instruction set.
struct LeavesPath {
  void (*sum_and_norm)(const SumNormCall& call, std::int64_t row);
  void (*gated)(const GatedCall& call, std::int64_t row, std::int64_t begin, std::int64_t end);
  // Widen, norm and rotate one token's heads into the work space.
  void (*open_token)(const JointCall& call, std::int64_t token);
  // Round one token's attention into the output.
  void (*close_token)(const JointCall& call, std::int64_t token);
  // The first of the greatest numbers; what is not a number is the greatest.
  std::int64_t (*greatest)(const float* numbers, std::int64_t size);
  // The place that a row's random number falls on; `weights` is work space for `size` of them.
  std::int64_t (*draw)(const DrawCall& call, std::int64_t row, std::int64_t* weights);
};

namespace portable {
LeavesPath leaves_path();
}
namespace avx2 {
LeavesPath leaves_path();
}
namespace avx512 {
LeavesPath leaves_path();
}

}  // namespace optgptq
