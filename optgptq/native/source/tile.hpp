// One group of columns for one tile of rows: the columns as they stand, their grids, the walk over each grid, the
// cheapest of them. The definition is `optgptq/solvers/rounding.py`. Included once by each instruction set.
#pragma once

#include "group.hpp"
#include "lanes.hpp"
#include "search.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Grids that are walked side by side: as many as the registers hold sums for.
constexpr int kTogether = OPTGPTQ_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kMaxCount = 8;

// Work space of a thread, all of it in vectors of one tile.
template <class T>
struct Tile {
  using V = typename Lanes<T>::Vector;
  V* weight;    // [L]
  V* pending;   // [L]
  V* current;   // [L], later the scale of each column where the grids are given
  V* zero;      // [L], the zero point of each column where the grids are given
  V* error;     // [L, K]
  V* weighted;  // [L, K]
  V* steps;     // [L, K]
  Grids<T>* grids;
};

template <class T>
Tile<T> tile_in(const GroupCall& call, void* scratch) {
  using V = typename Lanes<T>::Vector;
  const std::int64_t columns = padded(call.num_columns);
  Tile<T> tile;
  tile.grids = static_cast<Grids<T>*>(scratch);
  tile.weight = reinterpret_cast<V*>(tile.grids + 1);
  tile.pending = tile.weight + columns;
  tile.current = tile.pending + columns;
  tile.zero = tile.current + columns;
  tile.error = tile.zero + columns;
  tile.weighted = tile.error + columns * call.count;
  tile.steps = tile.weighted + columns * call.count;
  return tile;
}

template <class T>
std::size_t scratch_bytes(const GroupCall& call) {
  using V = typename Lanes<T>::Vector;
  return sizeof(Grids<T>) + sizeof(V) * static_cast<std::size_t>(padded(call.num_columns) * (4 + 3 * call.count));
}

// Write where the columns of the group stand if they compensate all that is pending: `w + x` with `x P = pending`.
template <class T>
void substitute(const GroupCall& call, const T* packed, const Tile<T>& tile) {
  using V = typename Lanes<T>::Vector;
  const T* inverse = packed + packed_size(call.num_columns);
  for (std::int64_t begin = 0; begin < call.num_columns; begin += kColumns) {
    const T* block = packed + block_offset(begin);
    V left[kColumns];
    for (int k = 0; k < kColumns; ++k) left[k] = tile.pending[begin + k];
    for (std::int64_t row = 0; row < begin; ++row) {
      const V solved = tile.current[row];
      for (int k = 0; k < kColumns; ++k) left[k] -= solved * block[row * kColumns + k];
    }
    for (int k = 0; k < kColumns; ++k) {
      const V solved = left[k] * inverse[begin + k];
      tile.current[begin + k] = solved;
      for (int later = k + 1; later < kColumns; ++later) {
        left[later] -= solved * block[(begin + k) * kColumns + later];
      }
    }
  }
  for (std::int64_t column = 0; column < call.num_columns; ++column) tile.current[column] += tile.weight[column];
}

// Walk grids `first .. first + K`; `Given` reads the grid of each column from the tile. Returns what they cost.
template <class T, int K, bool Given>
void walk(
    const GroupCall& call, const T* packed, const Tile<T>& tile, const typename Lanes<T>::Vector* scale,
    const typename Lanes<T>::Vector* zero_point, int first, typename Lanes<T>::Vector* cost) {
  using V = typename Lanes<T>::Vector;
  const T* inverse = packed + packed_size(call.num_columns);
  const T max_code = T(call.max_code);
  const std::int64_t count = call.count;
  V *error = tile.error + first, *weighted = tile.weighted + first, *steps = tile.steps + first;
  V spent[K];
  for (int k = 0; k < K; ++k) spent[k] = V{};
  for (std::int64_t begin = 0; begin < call.num_columns; begin += kColumns) {
    const T* block = packed + block_offset(begin);
    V sum[kColumns][K];
    for (int j = 0; j < kColumns; ++j) {
      for (int k = 0; k < K; ++k) sum[j][k] = tile.pending[begin + j];
    }
    for (std::int64_t row = 0; row < begin; ++row) {
      for (int k = 0; k < K; ++k) {
        const V done = error[row * count + k];
        for (int j = 0; j < kColumns; ++j) sum[j][k] += done * block[row * kColumns + j];
      }
    }
    for (int j = 0; j < kColumns; ++j) {
      const std::int64_t column = begin + j;
      if (column >= call.num_columns) break;
      const T pivot = block[column * kColumns + j];
      for (int k = 0; k < K; ++k) {
        const V step_size = Given ? tile.current[column] : scale[first + k];
        const V zero = Given ? tile.zero[column] : zero_point[first + k];
        const V stands = tile.weight[column] + sum[j][k] * inverse[column];
        const V step = smaller(larger(rounded<T>(stands / step_size), -zero), max_code - zero);
        const V missed = tile.weight[column] - step * step_size;
        const V paid = sum[j][k] + missed * pivot;
        error[column * count + k] = missed;
        steps[column * count + k] = step;
        weighted[column * count + k] = paid;
        spent[k] += paid * paid;
        for (int later = j + 1; later < kColumns; ++later) {
          sum[later][k] += missed * block[column * kColumns + later];
        }
      }
    }
  }
  for (int k = 0; k < K; ++k) cost[first + k] = spent[k];
}

template <class T>
void walk_all(
    const GroupCall& call, const T* packed, const Tile<T>& tile, const typename Lanes<T>::Vector* scale,
    const typename Lanes<T>::Vector* zero_point, typename Lanes<T>::Vector* cost) {
  int first = 0;
  for (; first + kTogether <= call.count; first += kTogether) {
    walk<T, kTogether, false>(call, packed, tile, scale, zero_point, first, cost);
  }
  for (; first < call.count; ++first) walk<T, 1, false>(call, packed, tile, scale, zero_point, first, cost);
}

// Write of every row what its cheapest grid gave.
template <class T>
void write(
    const GroupCall& call, const T* packed, const Tile<T>& tile, const typename Lanes<T>::Vector* scale,
    const typename Lanes<T>::Vector* zero_point, const typename Lanes<T>::Vector* cost, std::int64_t begin,
    std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  using I = typename Lanes<T>::Index;
  using Integer = typename Lanes<T>::Integer;
  const bool given = call.given_scale != nullptr;
  const T* inverse = packed + packed_size(call.num_columns);
  I best{};
  V least = cost[0];
  for (int k = 1; k < call.count; ++k) {
    const auto better = cost[k] < least;
    least = better ? cost[k] : least;
    best = better ? I{} + Integer(k) : best;
  }
  V step_size = scale[0], zero = zero_point[0], clipped{};
  for (int k = 1; k < call.count; ++k) {
    step_size = best == Integer(k) ? scale[k] : step_size;
    zero = best == Integer(k) ? zero_point[k] : zero;
  }
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const std::int64_t place = column * call.count;
    V error = tile.error[place], weighted = tile.weighted[place], step = tile.steps[place];
    for (int k = 1; k < call.count; ++k) {
      const auto chosen = best == Integer(k);
      error = chosen ? tile.error[place + k] : error;
      weighted = chosen ? tile.weighted[place + k] : weighted;
      step = chosen ? tile.steps[place + k] : step;
    }
    if (given) {
      step_size = tile.current[column];
      zero = tile.zero[column];
    }
    const auto outside = magnitude(weighted * inverse[column]) > magnitude(step_size) * T(call.half_step);
    clipped += outside ? V{} + T(1) : V{};
    store<T>(static_cast<T*>(call.error) + column * call.num_rows + begin, error, num_lanes);
    store<T>(static_cast<T*>(call.weighted) + column * call.num_rows + begin, weighted, num_lanes);
    const V code = step + zero;
    std::uint8_t* codes = call.codes + column * call.num_rows + begin;
    store_codes(codes, code, num_lanes);
  }
  for (std::int64_t lane = 0; lane < num_lanes; ++lane) {
    call.clipped[begin + lane] = static_cast<std::int64_t>(clipped[lane]);
  }
  if (given) return;
  store<T>(static_cast<T*>(call.scale) + begin, step_size, num_lanes);
  store<T>(static_cast<T*>(call.zero_point) + begin, zero, num_lanes);
}

template <class T>
void load_tile(const GroupCall& call, const Tile<T>& tile, std::int64_t begin, std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  const T* weight = static_cast<const T*>(call.weight) + begin;
  const T* pending = static_cast<const T*>(call.pending);
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    tile.weight[column] = load<T>(weight + column * call.weight_stride, num_lanes);
    if (pending != nullptr) {
      tile.pending[column] = load<T>(pending + column * call.pending_stride + begin, num_lanes);
    }
  }
  for (std::int64_t column = call.num_columns; column < padded(call.num_columns); ++column) {
    tile.weight[column] = tile.pending[column] = V{};
  }
}

template <class T>
void load_given(const GroupCall& call, const Tile<T>& tile, std::int64_t begin, std::int64_t num_lanes) {
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const std::int64_t grid = call.grid_of_column == nullptr ? 0 : call.grid_of_column[column];
    const std::int64_t place = grid * call.given_stride + begin;
    tile.current[column] = load<T>(static_cast<const T*>(call.given_scale) + place, num_lanes);
    tile.zero[column] = load<T>(static_cast<const T*>(call.given_zero_point) + place, num_lanes);
    // Lanes without a row divide by one.
    for (std::int64_t lane = num_lanes; lane < Lanes<T>::count; ++lane) tile.current[column][lane] = T(1);
  }
}

template <class T>
void round_tile(const GroupCall& call, const T* packed, void* scratch, std::int64_t index) {
  using V = typename Lanes<T>::Vector;
  const Tile<T> tile = tile_in<T>(call, scratch);
  const std::int64_t begin = index * Lanes<T>::count, rest = call.num_rows - begin;
  const std::int64_t num_lanes = rest < Lanes<T>::count ? rest : Lanes<T>::count;
  V scale[kMaxCount], zero_point[kMaxCount], cost[kMaxCount];
  load_tile<T>(call, tile, begin, num_lanes);
  if (call.given_scale != nullptr) {
    load_given<T>(call, tile, begin, num_lanes);
    scale[0] = zero_point[0] = V{};
    walk<T, 1, true>(call, packed, tile, scale, zero_point, 0, cost);
  } else if (call.error == nullptr) {
    find_grids<T>(call, tile.weight, *tile.grids, scale, zero_point);
    for (std::int64_t k = 0; k < call.count; ++k) {
      store<T>(static_cast<T*>(call.scale) + k * call.num_rows + begin, scale[k], num_lanes);
      store<T>(static_cast<T*>(call.zero_point) + k * call.num_rows + begin, zero_point[k], num_lanes);
    }
    return;
  } else {
    substitute<T>(call, packed, tile);
    find_grids<T>(call, tile.current, *tile.grids, scale, zero_point);
    walk_all<T>(call, packed, tile, scale, zero_point, cost);
  }
  write<T>(call, packed, tile, scale, zero_point, cost, begin, num_lanes);
}

}  // namespace

Path<float> path_float() { return {Lanes<float>::count, scratch_bytes<float>, round_tile<float>}; }
Path<double> path_double() { return {Lanes<double>::count, scratch_bytes<double>, round_tile<double>}; }

}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
