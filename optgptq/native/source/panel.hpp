// What one call for a panel is told: some columns of the rows of all heads, where rows of a head meet.
#pragma once

#include <cstddef>
#include <cstdint>

#include "group.hpp"

namespace optgptq {

// The layout is mirrored by `optgptq/native/panel.py`. Lanes are heads. Pointers of `group` are those of the first
// row; the numbers of the next row follow `num_heads` further on, in every matrix. `group.num_rows` is how far columns
// of the results lie apart. `group.weighted` gets `A`: what a row hands on.
struct PanelCall {
  GroupCall group;
  const void* output;   // [B, B, N], factor of the output moment of each head
  const void* earlier;  // [L, B, N], sums over the rows before these; null: there are none
  std::int64_t output_stride;   // numbers from one row of the factor to the next
  std::int64_t earlier_stride;  // numbers from one column to the next
  std::int64_t num_rows;        // rows of each head
  std::int64_t num_heads;
};

// One instruction set: how many heads a tile has, and what it does with one of them.
template <class T>
struct PanelPath {
  std::int64_t lanes;
  std::size_t (*scratch_bytes)(const PanelCall& call);
  // `packed` is the factor of `pack_factor`; `scratch` begins at a multiple of 64 bytes.
  void (*round_tile)(const PanelCall& call, const T* packed, void* scratch, std::int64_t tile);
};

namespace portable {
PanelPath<float> panel_float();
PanelPath<double> panel_double();
}  // namespace portable
namespace avx2 {
PanelPath<float> panel_float();
PanelPath<double> panel_double();
}  // namespace avx2
namespace avx512 {
PanelPath<float> panel_float();
PanelPath<double> panel_double();
}  // namespace avx512

}  // namespace optgptq
