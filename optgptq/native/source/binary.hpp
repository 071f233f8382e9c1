// What the calls for binary codes are told. Every call has columns of the weight as rows of its matrices; rows of the
// weight lie side by side. All numbers are float or all are double.
#pragma once

#include <cstddef>
#include <cstdint>

namespace optgptq {

// The layouts are mirrored by `optgptq/native/binary.py`.

// Which code of a codebook each row asks for, and at which scale; or what each shape costs each row at its best.
struct BinarySearchCall {
  const void* columns;              // [L, O], `columns_stride` numbers apart
  const void* price;                // [L], what a squared error in a column costs
  const void* factors;              // [num_factors], shares of the full range
  const std::int64_t* places;       // [S, K], of the gaps above each level and of the highest level (`find_gaps`)
  const std::int64_t* num_offsets;  // [S], codes of a shape: its levels, moved up by 0, 1, ...
  const std::int64_t* shapes;       // [O], the only shape that each row may have; null: any
  std::int64_t* index;              // [O], result: code; where shapes are given, its offset
  void* scale;                      // [O], result
  void* zero;                       // [O], result
  void* cost;                       // [O], result
  void* shape_cost;                 // [S, O], the only result where it is not null
  std::int64_t columns_stride;
  std::int64_t num_columns;
  std::int64_t num_rows;
  std::int64_t num_factors;
  std::int64_t num_shapes;
  std::int64_t num_levels;
  std::int64_t max_number;
  double smallest_scale;            // of the full range
  double tolerance;                 // costs in units of the squared scale that differ by less are equal
};

// What levels are made of: `level[k] = sum_b table[k, b] * coefficient[b]`. The last entry of every level is one.
struct BinaryTable {
  const void* entries;       // [K, B, O], or [K, B, 1] for all rows
  std::int64_t num_entries;  // O, or 1
  std::int64_t num_levels;
  std::int64_t num_coefficients;
};

// One group that is walked on given levels, fitted to its codes and walked again.
struct BinaryGroupCall {
  BinaryTable table;
  const void* weight;   // [L, O]
  const void* pending;  // [L, O]
  const void* upper;    // [L, L]
  const void* starts;   // [num_starts, B, O]
  std::uint8_t* codes;  // [L, O], result
  void* error;          // [L, O], result
  void* weighted;       // [L, O], result
  void* coefficient;    // [B, O], result
  std::int64_t weight_stride;
  std::int64_t pending_stride;
  std::int64_t upper_stride;
  std::int64_t num_columns;
  std::int64_t num_rows;
  std::int64_t num_starts;
  std::int64_t refits;
};

// One group of a finished weight whose coefficients and codes are improved under the whole moment.
struct BinarySweepCall {
  BinaryTable table;
  const void* gradient;           // [L, O]
  const void* moment;             // [L, L], symmetric
  const std::uint8_t* old_codes;  // [L, O]
  const void* old_coefficient;    // [B, O]
  const void* unit;               // [O], coefficients become multiples of it; null: values that float16 holds
  std::uint8_t* codes;            // [L, O], result
  void* coefficient;              // [B, O], result
  void* change;                   // [L, O], result: new level minus old one
  std::int64_t moment_stride;
  std::int64_t num_columns;
  std::int64_t num_rows;
  std::int64_t forced;
};

// Columns and the levels [K, O] they are rounded to.
struct BinaryNearestCall {
  const void* weight;  // [L, O]
  const void* level;   // [K, O]
  void* error;         // [L, O], result: weight minus nearest level
  std::int64_t num_columns;
  std::int64_t num_rows;
  std::int64_t num_levels;
};

// What all tiles of a call read: the group's triangle as `pack_factor` packs it, and its columns' sums.
template <class T>
struct PackedGroup {
  const T* triangle;
  const T* sums;  // [L]: of the triangle's columns, or of the rows of the whole moment
};

// One instruction set; a tile has one vector of rows. `scratch` begins at a multiple of 64 bytes.
template <class T>
struct BinaryPath {
  std::int64_t lanes;
  std::size_t (*search_bytes)(const BinarySearchCall& call);
  void (*search_tile)(const BinarySearchCall& call, void* scratch, std::int64_t tile);
  std::size_t (*group_bytes)(const BinaryGroupCall& call);
  void (*group_tile)(const BinaryGroupCall& call, const PackedGroup<T>& packed, void* scratch, std::int64_t tile);
  std::size_t (*sweep_bytes)(const BinarySweepCall& call);
  void (*sweep_tile)(const BinarySweepCall& call, const PackedGroup<T>& packed, void* scratch, std::int64_t tile);
  void (*nearest_tile)(const BinaryNearestCall& call, std::int64_t tile);
};

namespace portable {
BinaryPath<float> binary_float();
BinaryPath<double> binary_double();
}  // namespace portable
namespace avx2 {
BinaryPath<float> binary_float();
BinaryPath<double> binary_double();
}  // namespace avx2
namespace avx512 {
BinaryPath<float> binary_float();
BinaryPath<double> binary_double();
}  // namespace avx512

}  // namespace optgptq
