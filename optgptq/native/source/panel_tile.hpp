// The rows of one tile of heads, one after the other, in some columns. The definition is `optgptq/solvers/panel.py`.
// Included once by each instruction set.
#pragma once

#include "lanes.hpp"
#include "panel.hpp"
#include "tile.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Rows that receive the errors of all rows before them in one product: its sums fit in the registers.
constexpr int kRowsTogether = OPTGPTQ_VECTOR_BYTES == 64 ? 4 : 2;

// Work space of a thread beside that of `Tile`, in vectors.
template <class T>
struct PanelTile {
  using V = typename Lanes<T>::Vector;
  Tile<T> group;
  V* own;      // [B, L], what rows hand on
  V* earlier;  // [kRowsTogether, L], what rows receive
};

inline std::size_t in_vectors(std::size_t num_bytes) {
  return (num_bytes + OPTGPTQ_VECTOR_BYTES - 1) / OPTGPTQ_VECTOR_BYTES * OPTGPTQ_VECTOR_BYTES;
}

template <class T>
std::size_t panel_bytes(const PanelCall& call) {
  const std::int64_t rows = call.num_rows + kRowsTogether;
  const auto vectors = static_cast<std::size_t>(rows * padded(call.group.num_columns));
  return in_vectors(scratch_bytes<T>(call.group)) + vectors * OPTGPTQ_VECTOR_BYTES;
}

template <class T>
PanelTile<T> panel_tile_in(const PanelCall& call, void* scratch) {
  using V = typename Lanes<T>::Vector;
  PanelTile<T> tile;
  tile.group = tile_in<T>(call.group, scratch);
  tile.own = reinterpret_cast<V*>(static_cast<char*>(scratch) + in_vectors(scratch_bytes<T>(call.group)));
  tile.earlier = tile.own + call.num_rows * padded(call.group.num_columns);
  return tile;
}

template <class T>
OPTGPTQ_INLINE typename Lanes<T>::Vector output_entry(
    const PanelCall& call, std::int64_t from, std::int64_t to, std::int64_t begin, std::int64_t num_lanes) {
  const T* output = static_cast<const T*>(call.output);
  return load<T>(output + from * call.output_stride + to * call.num_heads + begin, num_lanes);
}

// Write what `R` rows from `row` on receive from all rows before `row`.
template <class T, int R>
void receive(
    const PanelCall& call, const PanelTile<T>& tile, std::int64_t row, std::int64_t begin, std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  const std::int64_t columns = padded(call.group.num_columns);
  const T* known = static_cast<const T*>(call.earlier);
  for (std::int64_t column = 0; column < columns; column += kColumns) {
    V sum[R][kColumns];
    for (int r = 0; r < R; ++r) {
      const std::int64_t place = (row + r) * call.num_heads + begin;
      for (int k = 0; k < kColumns; ++k) {
        const bool is_known = known != nullptr && column + k < call.group.num_columns;
        sum[r][k] = is_known ? load<T>(known + (column + k) * call.earlier_stride + place, num_lanes) : V{};
      }
    }
    for (std::int64_t before = 0; before < row; ++before) {
      const V* own = tile.own + before * columns + column;
      for (int r = 0; r < R; ++r) {
        const V factor = output_entry<T>(call, before, row + r, begin, num_lanes);
        for (int k = 0; k < kColumns; ++k) sum[r][k] += own[k] * factor;
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < kColumns; ++k) tile.earlier[r * columns + column + k] = sum[r][k];
    }
  }
}

// The call for one row: that of an ordinary group whose rows are the heads.
template <class T>
GroupCall row_call(const PanelCall& panel, std::int64_t row) {
  const std::int64_t place = row * panel.num_heads;
  GroupCall call = panel.group;
  call.weight = static_cast<const T*>(call.weight) + place;
  call.pending = static_cast<const T*>(call.pending) + place;
  call.error = static_cast<T*>(call.error) + place;
  call.weighted = static_cast<T*>(call.weighted) + place;
  call.codes += place;
  call.clipped += place;
  if (call.given_scale != nullptr) {
    call.given_scale = static_cast<const T*>(call.given_scale) + place;
    call.given_zero_point = static_cast<const T*>(call.given_zero_point) + place;
  } else {
    call.scale = static_cast<T*>(call.scale) + place;
    call.zero_point = static_cast<T*>(call.zero_point) + place;
  }
  return call;
}

template <class T>
void round_row(
    const GroupCall& call, const T* packed, const Tile<T>& tile, const typename Lanes<T>::Vector* received,
    std::int64_t begin, std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  V scale[kMaxCount], zero_point[kMaxCount], cost[kMaxCount];
  load_tile<T>(call, tile, begin, num_lanes);
  for (std::int64_t column = 0; column < call.num_columns; ++column) tile.pending[column] += received[column];
  if (call.given_scale != nullptr) {
    load_given<T>(call, tile, begin, num_lanes);
    scale[0] = zero_point[0] = V{};
    walk<T, 1, true>(call, packed, tile, scale, zero_point, 0, cost);
  } else {
    substitute<T>(call, packed, tile);
    find_grids<T>(call, tile.current, *tile.grids, scale, zero_point);
    walk_all<T>(call, packed, tile, scale, zero_point, cost);
  }
  write<T>(call, packed, tile, scale, zero_point, cost, begin, num_lanes);
}

// Return what a row receives from all rows before it, over its own pivot.
template <class T>
typename Lanes<T>::Vector* receive_row(
    const PanelCall& call, const PanelTile<T>& tile, std::int64_t row, std::int64_t begin, std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  const std::int64_t columns = padded(call.group.num_columns);
  // The last rows, too few for a product, receive one by one.
  const bool alone = row >= call.num_rows / kRowsTogether * kRowsTogether;
  const std::int64_t first = alone ? row : row / kRowsTogether * kRowsTogether;
  if (alone) {
    receive<T, 1>(call, tile, row, begin, num_lanes);
  } else if (row == first) {
    receive<T, kRowsTogether>(call, tile, row, begin, num_lanes);
  }
  V* received = tile.earlier + (row - first) * columns;
  for (std::int64_t before = first; before < row; ++before) {
    const V factor = output_entry<T>(call, before, row, begin, num_lanes);
    const V* own = tile.own + before * columns;
    for (std::int64_t column = 0; column < columns; ++column) received[column] += own[column] * factor;
  }
  V pivot = output_entry<T>(call, row, row, begin, num_lanes);
  // Lanes without a head divide by one.
  for (std::int64_t lane = num_lanes; lane < Lanes<T>::count; ++lane) pivot[lane] = T(1);
  const V inverse = T(1) / pivot;
  for (std::int64_t column = 0; column < columns; ++column) received[column] *= inverse;
  return received;
}

template <class T>
void round_panel_tile(const PanelCall& call, const T* packed, void* scratch, std::int64_t index) {
  using V = typename Lanes<T>::Vector;
  const PanelTile<T> tile = panel_tile_in<T>(call, scratch);
  const std::int64_t columns = padded(call.group.num_columns);
  const std::int64_t begin = index * Lanes<T>::count, rest = call.num_heads - begin;
  const std::int64_t num_lanes = rest < Lanes<T>::count ? rest : Lanes<T>::count;
  for (std::int64_t row = 0; row < call.num_rows; ++row) {
    const V* received = receive_row<T>(call, tile, row, begin, num_lanes);
    const GroupCall one = row_call<T>(call, row);
    round_row<T>(one, packed, tile.group, received, begin, num_lanes);
    // What this row hands on are its own errors: without those that it received.
    V* own = tile.own + row * columns;
    T* results = static_cast<T*>(one.weighted) + begin;
    for (std::int64_t column = 0; column < call.group.num_columns; ++column) {
      T* result = results + column * one.num_rows;
      own[column] = load<T>(result, num_lanes) - received[column];
      store<T>(result, own[column], num_lanes);
    }
    for (std::int64_t column = call.group.num_columns; column < columns; ++column) own[column] = V{};
  }
}

}  // namespace

PanelPath<float> panel_float() { return {Lanes<float>::count, panel_bytes<float>, round_panel_tile<float>}; }
PanelPath<double> panel_double() { return {Lanes<double>::count, panel_bytes<double>, round_panel_tile<double>}; }

}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
