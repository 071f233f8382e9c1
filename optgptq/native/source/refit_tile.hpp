// The gradient of long rows, and their scales once it is known. The definition is `optgptq/solvers/refit_scales.py`.
// Included once by each instruction set. Lanes are rows.
#pragma once

#include "lanes.hpp"
#include "refine_tile.hpp"
#include "refit.hpp"
#include "sweep.hpp"
#include "sweep_tile.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// The call of an ordinary refinement, as far as a refit reads it.
inline RefineCall refine_call(const SweepCall& call) {
  RefineCall result{};
  result.moment = call.moment;
  result.num_columns = call.num_columns;
  result.num_rows = call.num_rows;
  result.group_size = call.group_size;
  return result;
}

template <class T>
std::size_t tile_bytes(const SweepCall& call, std::int64_t vectors) {
  return refine_bytes<T>(refine_call(call), vectors);
}

// Put the gradient of some rows where their errors were.
template <class T, int W>
bool find_gradient(const SweepCall& call, void* scratch, std::int64_t begin) {
  using V = typename Lanes<T>::Vector;
  constexpr std::int64_t count = Lanes<T>::count;
  const RefineCall one = refine_call(call);
  const RefineTile<T> tile = refine_tile_in<T>(one, scratch, W);
  const T* moment = static_cast<const T*>(call.moment);
  T* numbers = static_cast<T*>(call.gradient) + begin * call.num_columns;
  const std::int64_t num_rows = lanes_left(one, begin, W * count), columns = call.num_columns;
  for (std::int64_t index = 0; index < columns * W; ++index) tile.error[index] = V{};
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (std::int64_t column = 0; column < columns; ++column) {
      tile.error[column * W + row / count][row % count] = numbers[row * columns + column];
    }
    call.loss[begin + row] = 0;
  }
  for (std::int64_t first = 0; first < columns; first += kBlock) {
    const std::int64_t width = columns - first < kBlock ? columns - first : kBlock;
    products<T, W>(moment + first * columns, columns, tile.error, columns, width, tile.gradient);
    for (std::int64_t row = 0; row < num_rows; ++row) {
      double loss = 0;
      for (std::int64_t column = 0; column < width; ++column) {
        const T gradient = tile.gradient[column * W + row / count][row % count];
        T* number = numbers + row * columns + first + column;
        loss += static_cast<double>(gradient) * static_cast<double>(*number);
        *number = gradient;
      }
      call.loss[begin + row] += loss;
    }
  }
  return true;
}

// Load one vector of rows: steps, scales, and the slope that follows from the gradient.
template <class T, int W>
void load_refit(const SweepCall& call, const RefineTile<T>& tile, std::int64_t first, std::int64_t lanes, int w) {
  using V = typename Lanes<T>::Vector;
  const std::int64_t groups = num_groups(call);
  for (std::int64_t group = 0; group < groups; ++group) {
    V scale = V{} + T(1);
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      scale[lane] = static_cast<const T*>(call.scale)[(first + lane) * groups + group];
    }
    tile.scale[group * W + w] = scale;
    tile.slope[group * W + w] = V{};
  }
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    V steps{}, gradient{};
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const std::int64_t place = (first + lane) * call.num_columns + column;
      steps[lane] = static_cast<const T*>(call.steps)[place];
      gradient[lane] = static_cast<const T*>(call.gradient)[place];
    }
    tile.steps[column * W + w] = steps;
    tile.slope[column / call.group_size * W + w] += gradient * steps;
  }
}

template <class T, int W>
bool refit_rows(const SweepCall& call, void* scratch, std::int64_t begin) {
  constexpr std::int64_t count = Lanes<T>::count;
  const RefineCall one = refine_call(call);
  const RefineTile<T> tile = refine_tile_in<T>(one, scratch, W);
  const std::int64_t groups = num_groups(call);
  double gain[W * count];
  for (int w = 0; w < W; ++w) {
    const std::int64_t first = begin + w * count;
    load_refit<T, W>(call, tile, first, lanes_left(one, first, count), w);
  }
  const bool changed = refit<T, W, true>(one, tile, gain);
  for (int w = 0; w < W; ++w) {
    const std::int64_t first = begin + w * count, lanes = lanes_left(one, first, count);
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      call.loss[first + lane] = gain[w * count + lane];
      for (std::int64_t group = 0; group < groups; ++group) {
        static_cast<T*>(call.scale)[(first + lane) * groups + group] = tile.scale[group * W + w][lane];
      }
    }
  }
  return changed;
}

template <class T>
bool tile_gradient(const SweepCall& call, void* scratch, std::int64_t begin, std::int64_t vectors) {
  return vectors == 1 ? find_gradient<T, 1>(call, scratch, begin) : find_gradient<T, kWide>(call, scratch, begin);
}

template <class T>
bool tile_refit(const SweepCall& call, void* scratch, std::int64_t begin, std::int64_t vectors) {
  return vectors == 1 ? refit_rows<T, 1>(call, scratch, begin) : refit_rows<T, kWide>(call, scratch, begin);
}

template <class T>
SweepPath<T> sweep_path() {
  return {Lanes<T>::count, kWide, tile_bytes<T>, tile_gradient<T>, tile_refit<T>, sweep_bytes<T>, sweep_rows<T>};
}

}  // namespace

SweepPath<float> sweep_float() { return sweep_path<float>(); }
SweepPath<double> sweep_double() { return sweep_path<double>(); }

}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
