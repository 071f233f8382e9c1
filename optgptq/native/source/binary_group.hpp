// One group of columns in binary codes for one tile of rows: walked on given levels, the coefficients fitted to the
// codes, walked again. The definition is `optgptq/solvers/binary_group.py`. Included once by each instruction set.
#pragma once

#include "binary.hpp"
#include "binary_levels.hpp"
#include "group.hpp"
#include "lanes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {
namespace binary {

// What one walk leaves behind.
template <class T, int B>
struct Walked {
  using V = typename Lanes<T>::Vector;
  V* error;     // [L]
  V* weighted;  // [L], `e P` with the pending sums in it
  V* code;      // [L]
  V coefficient[B];
  V cost;
};

// Work space of a thread, vectors of one tile.
template <class T, int B>
struct GroupTile {
  using V = typename Lanes<T>::Vector;
  V* weight;    // [L]
  V* pending;   // [L]
  V* column;    // [L, B - 1]
  V* whitened;  // [L, B - 1]
  Walked<T, B> latest;
  Walked<T, B> best;

  GroupTile(void* scratch, std::int64_t columns) {
    weight = static_cast<V*>(scratch);
    pending = weight + columns;
    latest.error = pending + columns;
    latest.weighted = latest.error + columns;
    latest.code = latest.weighted + columns;
    best.error = latest.code + columns;
    best.weighted = best.error + columns;
    best.code = best.weighted + columns;
    column = best.code + columns;
    whitened = column + columns * (B - 1);
  }
};

template <class T>
std::size_t group_bytes(const BinaryGroupCall& call) {
  const std::int64_t vectors = padded(call.num_columns) * (8 + 2 * (call.table.num_coefficients - 1));
  return sizeof(typename Lanes<T>::Vector) * static_cast<std::size_t>(vectors);
}

// Walk with the coefficients of `tile.latest`, and write the rest of it.
template <class T, int K, int B>
void walk(const BinaryGroupCall& call, const T* packed, const Table<T, K, B>& table, GroupTile<T, B>& tile) {
  using V = typename Lanes<T>::Vector;
  const T* inverse = packed + packed_size(call.num_columns);
  Walked<T, B>& walked = tile.latest;
  V level[K], spent{};
  table.levels(walked.coefficient, level);
  for (std::int64_t begin = 0; begin < call.num_columns; begin += kColumns) {
    const T* block = packed + block_offset(begin);
    V sum[kColumns];
    for (int j = 0; j < kColumns; ++j) sum[j] = tile.pending[begin + j];
    for (std::int64_t row = 0; row < begin; ++row) {
      const V done = walked.error[row];
      for (int j = 0; j < kColumns; ++j) sum[j] += done * block[row * kColumns + j];
    }
    for (int j = 0; j < kColumns; ++j) {
      const std::int64_t column = begin + j;
      if (column >= call.num_columns) break;
      const V weight = tile.weight[column];
      const Nearest<T, K> nearest(weight + sum[j] * inverse[column], level);
      const V missed = weight - nearest.level;
      const V paid = sum[j] + missed * block[column * kColumns + j];
      walked.error[column] = missed;
      walked.code[column] = nearest.code;
      walked.weighted[column] = paid;
      spent += paid * paid;
      for (int later = j + 1; later < kColumns; ++later) sum[later] += missed * block[column * kColumns + later];
    }
  }
  walked.cost = spent;
}

// Multiply what the codes pick from the table by the triangle.
template <class T, int K, int B>
void whiten(const BinaryGroupCall& call, const T* packed, const Table<T, K, B>& table, const GroupTile<T, B>& tile) {
  using V = typename Lanes<T>::Vector;
  constexpr int P = B - 1;
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    table.columns(tile.latest.code[column], tile.column + column * P);
  }
  for (std::int64_t begin = 0; begin < call.num_columns; begin += kColumns) {
    const T* block = packed + block_offset(begin);
    const std::int64_t end = begin + kColumns < call.num_columns ? begin + kColumns : call.num_columns;
    V sum[kColumns][P] = {};
    for (std::int64_t row = 0; row < end; ++row) {
      for (int j = 0; j < kColumns; ++j) {
        for (int p = 0; p < P; ++p) sum[j][p] += tile.column[row * P + p] * block[row * kColumns + j];
      }
    }
    for (int j = 0; j < kColumns; ++j) {
      for (int p = 0; p < P; ++p) tile.whitened[(begin + j) * P + p] = sum[j][p];
    }
  }
}

// Fit the coefficients of the latest walk to its codes.
template <class T, int K, int B>
void refit(
    const BinaryGroupCall& call, const PackedGroup<T>& packed, const Table<T, K, B>& table, GroupTile<T, B>& tile) {
  using V = typename Lanes<T>::Vector;
  whiten<T, K, B>(call, packed.triangle, table, tile);
  Fit<T, B> fit = {};
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    V own[B];
    for (int b = 0; b < B - 1; ++b) own[b] = tile.whitened[column * (B - 1) + b];
    own[B - 1] = V{} + packed.sums[column];
    const V weighted = tile.latest.weighted[column];
    for (int a = 0; a < B; ++a) {
      fit.slope[a] += own[a] * weighted;
      for (int b = a; b < B; ++b) fit.normal[a][b] += own[a] * own[b];
    }
  }
  fit.mirror();
  V change[B];
  fit.best_change(change);
  for (int b = 0; b < B; ++b) tile.latest.coefficient[b] = half_precision(tile.latest.coefficient[b] + change[b]);
}

// Keep the latest walk where it is the first or costs less.
template <class T, int B>
void keep_cheaper(const BinaryGroupCall& call, GroupTile<T, B>& tile, bool is_first) {
  using V = typename Lanes<T>::Vector;
  const Walked<T, B>& latest = tile.latest;
  Walked<T, B>& best = tile.best;
  if (is_first) best.cost = V{} + T(__builtin_inf());
  const auto takes = is_first ? best.cost == best.cost : latest.cost < best.cost;
  if (!any(takes)) return;
  best.cost = takes ? latest.cost : best.cost;
  for (int b = 0; b < B; ++b) best.coefficient[b] = takes ? latest.coefficient[b] : best.coefficient[b];
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    best.error[column] = takes ? latest.error[column] : best.error[column];
    best.weighted[column] = takes ? latest.weighted[column] : best.weighted[column];
    best.code[column] = takes ? latest.code[column] : best.code[column];
  }
}

// Go on from the best walk of each row; its errors are not needed.
template <class T, int B>
void resume_best(const BinaryGroupCall& call, GroupTile<T, B>& tile) {
  for (int b = 0; b < B; ++b) tile.latest.coefficient[b] = tile.best.coefficient[b];
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    tile.latest.weighted[column] = tile.best.weighted[column];
    tile.latest.code[column] = tile.best.code[column];
  }
}

template <class T, int B>
void load_group(const BinaryGroupCall& call, GroupTile<T, B>& tile, std::int64_t begin, std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    tile.weight[column] = load<T>(static_cast<const T*>(call.weight) + column * call.weight_stride + begin, num_lanes);
    tile.pending[column] =
        load<T>(static_cast<const T*>(call.pending) + column * call.pending_stride + begin, num_lanes);
  }
  for (std::int64_t column = call.num_columns; column < padded(call.num_columns); ++column) {
    tile.weight[column] = tile.pending[column] = V{};
  }
}

template <class T, int B>
void store_group(const BinaryGroupCall& call, const Walked<T, B>& best, std::int64_t begin, std::int64_t num_lanes) {
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const std::int64_t place = column * call.num_rows + begin;
    store<T>(static_cast<T*>(call.error) + place, best.error[column], num_lanes);
    store<T>(static_cast<T*>(call.weighted) + place, best.weighted[column], num_lanes);
    store_codes(call.codes + place, best.code[column], num_lanes);
  }
  for (int b = 0; b < B; ++b) {
    store<T>(static_cast<T*>(call.coefficient) + b * call.num_rows + begin, best.coefficient[b], num_lanes);
  }
}

template <class T, int K, int B>
void code_rows(
    const BinaryGroupCall& call, const PackedGroup<T>& packed, void* scratch, std::int64_t begin,
    std::int64_t num_lanes) {
  GroupTile<T, B> tile(scratch, padded(call.num_columns));
  const Table<T, K, B> table(call.table, begin, num_lanes);
  load_group<T, B>(call, tile, begin, num_lanes);
  for (std::int64_t start = 0; start < call.num_starts; ++start) {
    for (int b = 0; b < B; ++b) {
      const T* from = static_cast<const T*>(call.starts) + (start * B + b) * call.num_rows + begin;
      tile.latest.coefficient[b] = half_precision(load<T>(from, num_lanes));
    }
    walk<T, K, B>(call, packed.triangle, table, tile);
    keep_cheaper<T, B>(call, tile, start == 0);
  }
  resume_best<T, B>(call, tile);
  for (std::int64_t index = 0; index < call.refits; ++index) {
    refit<T, K, B>(call, packed, table, tile);
    walk<T, K, B>(call, packed.triangle, table, tile);
    keep_cheaper<T, B>(call, tile, false);
  }
  store_group<T, B>(call, tile.best, begin, num_lanes);
}

template <class T>
void group_tile(const BinaryGroupCall& call, const PackedGroup<T>& packed, void* scratch, std::int64_t index) {
  const std::int64_t begin = index * Lanes<T>::count, rest = call.num_rows - begin;
  const std::int64_t num_lanes = rest < Lanes<T>::count ? rest : Lanes<T>::count;
  with_sizes(call.table, [&](auto levels, auto coefficients) {
    code_rows<T, levels.value, coefficients.value>(call, packed, scratch, begin, num_lanes);
  });
}

}  // namespace binary
}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
