// Better coefficients, then better codes, of one group for one tile of rows under the whole moment. The definition is
// `optgptq/solvers/binary_sweep.py`. Included once by each instruction set.
#pragma once

#include "binary.hpp"
#include "binary_levels.hpp"
#include "group.hpp"
#include "lanes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {
namespace binary {

// Work space of a thread, vectors of one tile.
template <class T, int B>
struct SweepTile {
  using V = typename Lanes<T>::Vector;
  V* gradient;  // [L]
  V* code;      // [L]
  V* change;    // [L], new level minus the old code's level, both of the new coefficients
  V* column;    // [L, B - 1], what the codes pick from the table
  V* product;   // [L, B - 1], the moment times it

  SweepTile(void* scratch, std::int64_t columns) {
    gradient = static_cast<V*>(scratch);
    code = gradient + columns;
    change = code + columns;
    column = change + columns;
    product = column + columns * (B - 1);
  }
};

template <class T>
std::size_t sweep_bytes(const BinarySweepCall& call) {
  const std::int64_t vectors = padded(call.num_columns) * (3 + 2 * (call.table.num_coefficients - 1));
  return sizeof(typename Lanes<T>::Vector) * static_cast<std::size_t>(vectors);
}

template <class T, int B, int J>
OPTGPTQ_INLINE void some_rows(const BinarySweepCall& call, const SweepTile<T, B>& tile, std::int64_t row) {
  using V = typename Lanes<T>::Vector;
  constexpr int P = B - 1;
  const T* moment = static_cast<const T*>(call.moment) + row * call.moment_stride;
  V sum[J][P] = {};
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    for (int j = 0; j < J; ++j) {
      const T factor = moment[j * call.moment_stride + column];
      for (int p = 0; p < P; ++p) sum[j][p] += tile.column[column * P + p] * factor;
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int p = 0; p < P; ++p) tile.product[(row + j) * P + p] = sum[j][p];
  }
}

template <class T, int B>
void multiply(const BinarySweepCall& call, const SweepTile<T, B>& tile) {
  std::int64_t row = 0;
  for (; row + kColumns <= call.num_columns; row += kColumns) some_rows<T, B, kColumns>(call, tile, row);
  for (; row < call.num_columns; ++row) some_rows<T, B, 1>(call, tile, row);
}

template <class T, int B>
Fit<T, B> normal_equations(const BinarySweepCall& call, const PackedGroup<T>& packed, const SweepTile<T, B>& tile) {
  using V = typename Lanes<T>::Vector;
  constexpr int P = B - 1;
  Fit<T, B> fit = {};
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const V gradient = tile.gradient[column];
    const V* own = tile.column + column * P;
    const V* product = tile.product + column * P;
    for (int a = 0; a < P; ++a) {
      fit.slope[a] += own[a] * gradient;
      for (int b = a; b < P; ++b) fit.normal[a][b] += own[a] * product[b];
      fit.normal[a][P] += own[a] * packed.sums[column];
    }
    fit.slope[P] += gradient;
    fit.normal[P][P] += packed.sums[column];
  }
  fit.mirror();
  return fit;
}

template <class T>
OPTGPTQ_INLINE typename Lanes<T>::Vector in_units(
    typename Lanes<T>::Vector value, typename Lanes<T>::Vector unit) {
  using V = typename Lanes<T>::Vector;
  const V zero{};
  return rounded<T>(smaller(larger(value / unit, zero - T(kLargestByte)), zero + T(kLargestByte))) * unit;
}

// Write the coefficients that lose least, as they are stored, and bring the gradient to them.
template <class T, int B>
void refit_group(
    const BinarySweepCall& call, const PackedGroup<T>& packed, const SweepTile<T, B>& tile, std::int64_t begin,
    std::int64_t num_lanes, const typename Lanes<T>::Vector* old, typename Lanes<T>::Vector* wanted) {
  using V = typename Lanes<T>::Vector;
  constexpr int P = B - 1;
  multiply<T, B>(call, tile);
  const Fit<T, B> fit = normal_equations<T, B>(call, packed, tile);
  V change[B], gain{};
  fit.best_change(change);
  const T* units = static_cast<const T*>(call.unit);
  for (int b = 0; b < B; ++b) {
    wanted[b] = old[b] + change[b];
    wanted[b] = units == nullptr ? half_precision(wanted[b]) : in_units<T>(wanted[b], load<T>(units + begin, num_lanes));
    change[b] = wanted[b] - old[b];
  }
  for (int a = 0; a < B; ++a) {
    V moved{};
    for (int b = 0; b < B; ++b) moved += fit.normal[a][b] * change[b];
    gain += change[a] * (T(2) * fit.slope[a] - moved);
  }
  if (!call.forced) {
    for (int b = 0; b < B; ++b) {
      wanted[b] = gain > T(0) ? wanted[b] : old[b];
      change[b] = gain > T(0) ? change[b] : V{};
    }
  }
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    V sum = change[P] * packed.sums[column];
    for (int p = 0; p < P; ++p) sum += change[p] * tile.product[column * P + p];
    tile.gradient[column] -= sum;
  }
}

template <class V, int B>
OPTGPTQ_INLINE V level_of(const V* column, const V* coefficient) {
  V level = column[0] * coefficient[0];
  for (int b = 1; b < B - 1; ++b) level += column[b] * coefficient[b];
  return level + coefficient[B - 1];
}

// Move every code in turn to its best level.
template <class T, int K, int B>
void descend(
    const BinarySweepCall& call, const PackedGroup<T>& packed, const SweepTile<T, B>& tile,
    const typename Lanes<T>::Vector* level, const typename Lanes<T>::Vector* coefficient) {
  using V = typename Lanes<T>::Vector;
  const T* inverse = packed.triangle + packed_size(call.num_columns);
  for (std::int64_t begin = 0; begin < call.num_columns; begin += kColumns) {
    const T* block = packed.triangle + block_offset(begin);
    V left[kColumns];
    for (int j = 0; j < kColumns; ++j) left[j] = tile.gradient[begin + j];
    for (std::int64_t row = 0; row < begin; ++row) {
      const V moved = tile.change[row];
      for (int j = 0; j < kColumns; ++j) left[j] -= moved * block[row * kColumns + j];
    }
    for (int j = 0; j < kColumns; ++j) {
      const std::int64_t column = begin + j;
      if (column >= call.num_columns) break;
      tile.change[column] = V{};
      if (!(block[column * kColumns + j] > T(0))) continue;
      const V old = level_of<V, B>(tile.column + column * (B - 1), coefficient);
      const Nearest<T, K> nearest(old + left[j] * inverse[column], level);
      const V moved = nearest.level - old;
      tile.change[column] = moved;
      tile.code[column] = nearest.code;
      for (int later = j + 1; later < kColumns; ++later) left[later] -= moved * block[column * kColumns + later];
    }
  }
}

template <class T, int K, int B>
void improve_rows(
    const BinarySweepCall& call, const PackedGroup<T>& packed, void* scratch, std::int64_t begin,
    std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  constexpr int P = B - 1;
  const SweepTile<T, B> tile(scratch, padded(call.num_columns));
  const Table<T, K, B> table(call.table, begin, num_lanes);
  V old[B], wanted[B], level[K];
  for (int b = 0; b < B; ++b) {
    old[b] = load<T>(static_cast<const T*>(call.old_coefficient) + b * call.num_rows + begin, num_lanes);
  }
  for (std::int64_t column = 0; column < padded(call.num_columns); ++column) tile.gradient[column] = V{};
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const std::int64_t place = column * call.num_rows + begin;
    tile.gradient[column] = load<T>(static_cast<const T*>(call.gradient) + place, num_lanes);
    tile.code[column] = load_codes<T>(call.old_codes + place, num_lanes);
    table.columns(tile.code[column], tile.column + column * P);
  }
  refit_group<T, B>(call, packed, tile, begin, num_lanes, old, wanted);
  table.levels(wanted, level);
  descend<T, K, B>(call, packed, tile, level, wanted);
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const std::int64_t place = column * call.num_rows + begin;
    const V* own = tile.column + column * P;
    const V change = level_of<V, B>(own, wanted) - level_of<V, B>(own, old) + tile.change[column];
    store<T>(static_cast<T*>(call.change) + place, change, num_lanes);
    store_codes(call.codes + place, tile.code[column], num_lanes);
  }
  for (int b = 0; b < B; ++b) {
    store<T>(static_cast<T*>(call.coefficient) + b * call.num_rows + begin, wanted[b], num_lanes);
  }
}

template <class T>
void sweep_tile(const BinarySweepCall& call, const PackedGroup<T>& packed, void* scratch, std::int64_t index) {
  const std::int64_t begin = index * Lanes<T>::count, rest = call.num_rows - begin;
  const std::int64_t num_lanes = rest < Lanes<T>::count ? rest : Lanes<T>::count;
  with_sizes(call.table, [&](auto levels, auto coefficients) {
    improve_rows<T, levels.value, coefficients.value>(call, packed, scratch, begin, num_lanes);
  });
}

}  // namespace binary
}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
