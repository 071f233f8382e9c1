// Coordinate descent over the codes of long rows whose gradient is known. The definition is
// `optgptq/solvers/descend.py`. Included once by each instruction set.
//
// Few codes move, so the gradient is kept up to date by the moves alone: a panel of columns takes in, just before it is
// visited, all moves since its last visit, of columns to its left in this sweep and to its right in the one before.
// Lanes are columns here.
#pragma once

#include "descend.hpp"
#include "lanes.hpp"
#include "sweep.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Columns of a panel: a square of the moment of this size stays near the processor.
constexpr std::int64_t kPanelColumns = 256;
// Vectors of a row that are summed in registers.
constexpr int kSummed = OPTGPTQ_VECTOR_BYTES == 64 ? 16 : 8;

// Moves of one sweep: of each row, in the order of the columns.
template <class T>
struct Moves {
  std::int32_t* column;  // [R, I]
  T* change;             // [R, I], of the error
  std::int32_t* end;     // [R, panels + 1], moves before each panel
};

template <class T>
struct SweepRows {
  std::int64_t begin, count, panels;
  Moves<T> now, before;
  T* inverse_diagonal;  // [I], zero where there is no moment
};

inline std::int64_t num_panels(const SweepCall& call) {
  return (call.num_columns + kPanelColumns - 1) / kPanelColumns;
}

inline std::size_t aligned_bytes(std::size_t num_bytes) { return (num_bytes + 63) / 64 * 64; }

template <class T>
std::size_t moves_bytes(const SweepCall& call, std::int64_t num_rows) {
  const auto moves = static_cast<std::size_t>(num_rows * call.num_columns);
  const auto ends = static_cast<std::size_t>(num_rows * (num_panels(call) + 1));
  return aligned_bytes(moves * sizeof(std::int32_t)) + aligned_bytes(moves * sizeof(T)) +
         aligned_bytes(ends * sizeof(std::int32_t));
}

template <class T>
std::size_t sweep_bytes(const SweepCall& call, std::int64_t num_rows) {
  return 2 * moves_bytes<T>(call, num_rows) + aligned_bytes(static_cast<std::size_t>(call.num_columns) * sizeof(T));
}

template <class T>
Moves<T> moves_in(const SweepCall& call, std::int64_t num_rows, char* memory) {
  const auto moves = static_cast<std::size_t>(num_rows * call.num_columns);
  Moves<T> result;
  result.column = reinterpret_cast<std::int32_t*>(memory);
  memory += aligned_bytes(moves * sizeof(std::int32_t));
  result.change = reinterpret_cast<T*>(memory);
  result.end = reinterpret_cast<std::int32_t*>(memory + aligned_bytes(moves * sizeof(T)));
  return result;
}

// Add `num_moves` rows of the moment, each times its change, to `count` vectors of numbers from `column` on.
template <class T, int N>
OPTGPTQ_INLINE void add_vectors(
    const SweepCall& call, const std::int32_t* columns, const T* changes, std::int64_t num_moves, std::int64_t column,
    T* gradient) {
  using V = typename Lanes<T>::Vector;
  const T* moment = static_cast<const T*>(call.moment) + column;
  V sum[N];
  for (int n = 0; n < N; ++n) __builtin_memcpy(&sum[n], gradient + n * Lanes<T>::count, sizeof(V));
  for (std::int64_t move = 0; move < num_moves; ++move) {
    const T* row = moment + columns[move] * call.num_columns;
    const T change = changes[move];
    for (int n = 0; n < N; ++n) {
      V factor;
      __builtin_memcpy(&factor, row + n * Lanes<T>::count, sizeof(V));
      sum[n] += factor * change;
    }
  }
  for (int n = 0; n < N; ++n) __builtin_memcpy(gradient + n * Lanes<T>::count, &sum[n], sizeof(V));
}

// Bring the gradient of columns `begin .. end` of one row up to date.
template <class T>
void add_moves(
    const SweepCall& call, const std::int32_t* columns, const T* changes, std::int64_t num_moves, std::int64_t begin,
    std::int64_t end, T* gradient) {
  constexpr std::int64_t lanes = Lanes<T>::count;
  std::int64_t column = begin;
  for (; column + kSummed * lanes <= end; column += kSummed * lanes) {
    add_vectors<T, kSummed>(call, columns, changes, num_moves, column, gradient + column);
  }
  for (; column + lanes <= end; column += lanes) {
    add_vectors<T, 1>(call, columns, changes, num_moves, column, gradient + column);
  }
  const T* moment = static_cast<const T*>(call.moment);
  for (; column < end; ++column) {
    T sum = gradient[column];
    for (std::int64_t move = 0; move < num_moves; ++move) {
      sum += moment[columns[move] * call.num_columns + column] * changes[move];
    }
    gradient[column] = sum;
  }
}

// Let one panel of all rows take in the moves of another.
template <class T>
void take_in(
    const SweepCall& call, const SweepRows<T>& rows, const Moves<T>& moves, std::int64_t from, std::int64_t panel) {
  const std::int64_t begin = panel * kPanelColumns, rest = call.num_columns - begin;
  const std::int64_t end = begin + (rest < kPanelColumns ? rest : kPanelColumns);
  for (std::int64_t row = 0; row < rows.count; ++row) {
    const std::int32_t* ends = moves.end + row * (rows.panels + 1) + from;
    if (ends[0] == ends[1]) continue;
    const std::int64_t place = row * call.num_columns + ends[0];
    T* gradient = static_cast<T*>(call.gradient) + (rows.begin + row) * call.num_columns;
    add_moves<T>(call, moves.column + place, moves.change + place, ends[1] - ends[0], begin, end, gradient);
  }
}

// What the columns of one vector of a row have in common with their groups.
template <class T>
struct ColumnRange {
  typename Lanes<T>::Vector scale, lowest, highest;

  ColumnRange(const SweepCall& call, std::int64_t row, std::int64_t column, std::int64_t num_lanes)
      : scale{}, lowest{}, highest{} {
    using V = typename Lanes<T>::Vector;
    const std::int64_t first = column / call.group_size, last = (column + num_lanes - 1) / call.group_size;
    const std::int64_t place = row * num_groups(call) + first;
    const T *scales = static_cast<const T*>(call.scale) + place, *lows = static_cast<const T*>(call.lowest) + place,
            *highs = static_cast<const T*>(call.highest) + place;
    if (first == last) {
      scale = V{} + scales[0];
      lowest = V{} + lows[0];
      highest = V{} + highs[0];
      return;
    }
    scale = V{} + T(1);
    for (std::int64_t lane = 0; lane < num_lanes; ++lane) {
      const std::int64_t group = (column + lane) / call.group_size - first;
      scale[lane] = scales[group];
      lowest[lane] = lows[group];
      highest[lane] = highs[group];
    }
  }
};

// Visit the columns of one panel of one row; returns how many moves the row has made in this sweep.
template <class T>
std::int32_t visit(
    const SweepCall& call, const SweepRows<T>& rows, std::int64_t row, std::int64_t panel, std::int32_t num_moves) {
  using V = typename Lanes<T>::Vector;
  constexpr std::int64_t lanes = Lanes<T>::count;
  const std::int64_t begin = panel * kPanelColumns, rest = call.num_columns - begin;
  const std::int64_t end = begin + (rest < kPanelColumns ? rest : kPanelColumns);
  T* gradient = static_cast<T*>(call.gradient) + (rows.begin + row) * call.num_columns;
  T* steps = static_cast<T*>(call.steps) + (rows.begin + row) * call.num_columns;
  std::int32_t* columns = rows.now.column + row * call.num_columns;
  T* changes = rows.now.change + row * call.num_columns;
  for (std::int64_t column = begin; column < end; column += lanes) {
    const std::int64_t num_lanes = end - column < lanes ? end - column : lanes;
    const ColumnRange<T> range(call, rows.begin + row, column, num_lanes);
    const V inverse = load<T>(rows.inverse_diagonal + column, num_lanes) / range.scale;
    const V old = load<T>(steps + column, num_lanes);
    // Columns before `from` had their turn.
    for (std::int64_t from = 0; from < num_lanes;) {
      const V nearest = rounded<T>(old + load<T>(gradient + column, num_lanes) * inverse);
      const V best = smaller(larger(nearest, range.lowest), range.highest);
      if (!differ(best, old)) break;
      while (from < num_lanes && best[from] == old[from]) ++from;
      if (from == num_lanes) break;
      steps[column + from] = best[from];
      columns[num_moves] = static_cast<std::int32_t>(column + from);
      changes[num_moves] = (old[from] - best[from]) * range.scale[from];
      add_moves<T>(call, columns + num_moves, changes + num_moves, 1, begin, end, gradient);
      ++num_moves;
      ++from;
    }
  }
  return num_moves;
}

// Visit every column of every row once; returns whether a step changed.
template <class T>
bool sweep_once(const SweepCall& call, const SweepRows<T>& rows, bool is_first) {
  bool changed = false;
  for (std::int64_t row = 0; row < rows.count; ++row) rows.now.end[row * (rows.panels + 1)] = 0;
  for (std::int64_t panel = 0; panel < rows.panels; ++panel) {
    for (std::int64_t from = 0; from < panel; ++from) take_in<T>(call, rows, rows.now, from, panel);
    if (!is_first) {
      for (std::int64_t from = panel + 1; from < rows.panels; ++from) take_in<T>(call, rows, rows.before, from, panel);
    }
    for (std::int64_t row = 0; row < rows.count; ++row) {
      std::int32_t* ends = rows.now.end + row * (rows.panels + 1) + panel;
      ends[1] = visit<T>(call, rows, row, panel, ends[0]);
      changed |= ends[1] != ends[0];
    }
  }
  return changed;
}

template <class T>
bool sweep_rows(const SweepCall& call, void* scratch, std::int64_t begin, std::int64_t num_rows) {
  char* memory = static_cast<char*>(scratch);
  const std::size_t size = moves_bytes<T>(call, num_rows);
  SweepRows<T> rows{begin, num_rows, num_panels(call), moves_in<T>(call, num_rows, memory),
                    moves_in<T>(call, num_rows, memory + size), reinterpret_cast<T*>(memory + 2 * size)};
  const T* moment = static_cast<const T*>(call.moment);
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const T own = moment[column * (call.num_columns + 1)];
    rows.inverse_diagonal[column] = own > T(0) ? T(1) / own : T(0);
  }
  bool changed = false;
  for (std::int64_t index = 0; index < call.code_sweeps; ++index) {
    if (!sweep_once<T>(call, rows, index == 0)) return changed;
    changed = true;
    const Moves<T> swap = rows.now;
    rows.now = rows.before;
    rows.before = swap;
  }
  for (std::int64_t panel = 0; panel < rows.panels && changed; ++panel) {
    for (std::int64_t from = panel + 1; from < rows.panels; ++from) take_in<T>(call, rows, rows.before, from, panel);
  }
  return changed;
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
