// What one call for a group of columns is told, and the packed form of the factor that all tiles of rows share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace optgptq {

// Columns that are brought up to date together.
constexpr std::int64_t kColumns = 4;

// The layout is mirrored by `optgptq/native/group.py`. Matrices have columns of the weight as rows; rows of a matrix
// are `*_stride` numbers apart, the numbers of a row lie side by side. All numbers are float or all are double.
struct GroupCall {
  const void* weight;            // [L, O]
  const void* pending;           // [L, O]
  const void* upper;             // [L, L]
  const void* price;             // [L], what a squared error in a column costs
  const void* shares;            // [num_shares], of the full range; the coarse scan
  const void* factors;           // [num_factors], of the best scale; the fine scan
  const void* given_scale;       // [G, O]; null: the grids are searched
  const void* given_zero_point;  // [G, O]
  const std::int64_t* grid_of_column;  // [L]; null: grid 0
  void* error;                   // [L, O]; null: no walk, the result is the `count` best grids
  void* weighted;                // [L, O]
  std::uint8_t* codes;           // [L, O]
  std::int64_t* clipped;         // [O]
  void* scale;                   // [O] after a walk, else [count, O]
  void* zero_point;              // the same
  std::int64_t weight_stride;
  std::int64_t pending_stride;
  std::int64_t upper_stride;
  std::int64_t given_stride;
  std::int64_t num_columns;
  std::int64_t num_rows;
  std::int64_t num_shares;       // 0: the full range, not searched
  std::int64_t num_factors;
  std::int64_t count;            // grids that are walked
  std::int64_t symmetric;
  double max_code;
  double smallest_zero_point;
  double symmetric_zero_point;
  double half_step;              // how far in steps a weight may be from its level without being clipped
};

// The factor by blocks of `kColumns` columns; a block has the rows from the first one to its own last one.
// Offset in numbers of the block that begins at column `begin`.
inline std::int64_t block_offset(std::int64_t begin) { return begin * (begin + kColumns) / 2; }

// Numbers of the packed factor; the reciprocals of the pivots follow after it.
inline std::int64_t packed_size(std::int64_t num_columns) {
  return block_offset((num_columns + kColumns - 1) / kColumns * kColumns);
}

// Columns rounded up to whole blocks.
inline std::int64_t padded(std::int64_t num_columns) { return (num_columns + kColumns - 1) / kColumns * kColumns; }

template <class T>
void pack_factor(const GroupCall& call, T* packed) {
  const T* upper = static_cast<const T*>(call.upper);
  T* inverse = packed + packed_size(call.num_columns);
  for (std::int64_t begin = 0; begin < call.num_columns; begin += kColumns) {
    T* block = packed + block_offset(begin);
    for (std::int64_t row = 0; row < begin + kColumns; ++row) {
      for (std::int64_t k = 0; k < kColumns; ++k) {
        const std::int64_t column = begin + k;
        const bool inside = row <= column && column < call.num_columns;
        block[row * kColumns + k] = inside ? upper[row * call.upper_stride + column] : T(0);
      }
    }
  }
  for (std::int64_t column = 0; column < padded(call.num_columns); ++column) {
    inverse[column] = column < call.num_columns ? T(1) / upper[column * call.upper_stride + column] : T(1);
  }
}

// One instruction set: how many rows a tile has, and what it does with one of them.
template <class T>
struct Path {
  std::int64_t lanes;
  // Bytes of work space for one thread.
  std::size_t (*scratch_bytes)(const GroupCall& call);
  // `packed` is the factor of `pack_factor`; `scratch` begins at a multiple of 64 bytes.
  void (*round_tile)(const GroupCall& call, const T* packed, void* scratch, std::int64_t tile);
};

namespace portable {
Path<float> path_float();
Path<double> path_double();
}  // namespace portable
namespace avx2 {
Path<float> path_float();
Path<double> path_double();
}  // namespace avx2
namespace avx512 {
Path<float> path_float();
Path<double> path_double();
}  // namespace avx512

}  // namespace optgptq
