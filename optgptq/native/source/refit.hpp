// The best scales for the codes of one tile of rows. The definition is `optgptq/solvers/refit_scales.py`; its names
// are used here. Included once by each instruction set.
#pragma once

#include "descend.hpp"
#include "lanes.hpp"
#include "refine.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

constexpr double kRidge = 1e-6;
constexpr double kLargestChange = 2.0;
constexpr int kRoundedSweeps = 2;

// What the scales of one vector of rows are solved in: numbers of a row stand `count` apart.
template <class T>
struct Fit {
  static constexpr std::int64_t count = Lanes<T>::count;
  std::int64_t groups;
  double* normal;  // [G, G, lanes], all of it
  double* factor;  // [G, G, lanes], on and below the diagonal
  double* slope;   // [G, lanes]
  double* size;    // [G, lanes]
  double* change;  // [G, lanes]
  double* before;  // [G, lanes]
  double* scale;   // [G, lanes]

  Fit(double* memory, std::int64_t num_groups) : groups(num_groups) {
    const std::int64_t vector = groups * count, matrix = groups * vector;
    normal = memory;
    factor = normal + matrix;
    slope = factor + matrix;
    size = slope + vector;
    change = size + vector;
    before = change + vector;
    scale = before + vector;
  }

  static std::int64_t numbers(std::int64_t num_groups) { return num_groups * count * (2 * num_groups + 5); }
  double* entry(double* matrix, std::int64_t row, std::int64_t column) const {
    return matrix + (row * groups + column) * count;
  }
};

OPTGPTQ_INLINE void round_for_storage(double* scales, float) {
  FloatVector single;
  for (std::int64_t lane = 0; lane < Lanes<float>::count; ++lane) single[lane] = static_cast<float>(scales[lane]);
  single = storable(single);
  for (std::int64_t lane = 0; lane < Lanes<float>::count; ++lane) scales[lane] = single[lane];
}

OPTGPTQ_INLINE void round_for_storage(double* scales, double) {
  store<double>(scales, storable(load<double>(scales, Lanes<double>::count)), Lanes<double>::count);
}

// The storable scale nearest to `old + change`, or `before` where the sign would change or the size by too much.
template <class T>
OPTGPTQ_INLINE void guarded(const double* before, const double* old, const double* change, double* result) {
  for (std::int64_t lane = 0; lane < Lanes<T>::count; ++lane) result[lane] = old[lane] + change[lane];
  round_for_storage(result, T());
  for (std::int64_t lane = 0; lane < Lanes<T>::count; ++lane) {
    const double ratio = result[lane] / before[lane];
    result[lane] = ratio >= 1 / kLargestChange && ratio <= kLargestChange ? result[lane] : before[lane];
  }
}

// Write `B H (t - Q)^T`, where it is not known, and `B H B^T` of all rows of the tile.
template <class T, int W, bool SlopeIsKnown>
void normal_equations(const RefineCall& call, const RefineTile<T>& tile) {
  using V = typename Lanes<T>::Vector;
  const T* moment = static_cast<const T*>(call.moment);
  const std::int64_t columns = call.num_columns, size = call.group_size, groups = num_groups(call);
  for (std::int64_t index = 0; index < groups * W && !SlopeIsKnown; ++index) tile.slope[index] = V{};
  for (std::int64_t index = 0; index < groups * groups * W; ++index) tile.normal[index] = V{};
  for (std::int64_t begin = 0; begin < columns; begin += kBlock) {
    const std::int64_t end = begin + kBlock < columns ? begin + kBlock : columns;
    if (!SlopeIsKnown) {
      products<T, W>(moment + begin * columns, columns, tile.error, columns, end - begin, tile.gradient);
    }
    for (std::int64_t column = begin; column < end && !SlopeIsKnown; ++column) {
      for (int w = 0; w < W; ++w) {
        tile.slope[column / size * W + w] += tile.gradient[(column - begin) * W + w] * tile.steps[column * W + w];
      }
    }
    for (std::int64_t group = 0; group <= (end - 1) / size; ++group) {
      const std::int64_t first = group * size, stop = first + size < columns ? first + size : columns;
      const std::int64_t from = first > begin ? first : begin;
      products<T, W>(
          moment + from * columns + first, columns, tile.steps + first * W, stop - first, end - from, tile.gradient);
      for (std::int64_t column = from; column < end; ++column) {
        V* entry = tile.normal + (group * groups + column / size) * W;
        for (int w = 0; w < W; ++w) entry[w] += tile.gradient[(column - from) * W + w] * tile.steps[column * W + w];
      }
    }
  }
}

// Factor `B H B^T`, its diagonal brought to one and the ridge added; `failed` is set in lanes where that is impossible.
template <class T>
void factor_normal(const Fit<T>& fit, bool* failed) {
  constexpr std::int64_t count = Lanes<T>::count;
  for (std::int64_t lane = 0; lane < count; ++lane) failed[lane] = false;
  for (std::int64_t column = 0; column < fit.groups; ++column) {
    const double* pivot = fit.entry(fit.factor, column, column);
    for (std::int64_t row = column; row < fit.groups; ++row) {
      double left[count];
      const double *normal = fit.entry(fit.normal, row, column), *first = fit.size + row * count,
                   *second = fit.size + column * count;
      for (std::int64_t lane = 0; lane < count; ++lane) {
        left[lane] = row == column ? 1 + kRidge : normal[lane] / (first[lane] * second[lane]);
      }
      for (std::int64_t k = 0; k < column; ++k) {
        const double *upper = fit.entry(fit.factor, row, k), *lower = fit.entry(fit.factor, column, k);
        for (std::int64_t lane = 0; lane < count; ++lane) left[lane] -= upper[lane] * lower[lane];
      }
      double* to = fit.entry(fit.factor, row, column);
      for (std::int64_t lane = 0; lane < count; ++lane) {
        if (row == column) {
          failed[lane] |= !(left[lane] > 0);
          to[lane] = __builtin_sqrt(left[lane] > 0 ? left[lane] : 1.0);
        } else {
          to[lane] = left[lane] / pivot[lane];
        }
      }
    }
  }
}

// Write how the scales change to lose least; zero where nothing tells.
template <class T>
void solve_change(const Fit<T>& fit) {
  constexpr std::int64_t count = Lanes<T>::count;
  for (std::int64_t group = 0; group < fit.groups; ++group) {
    const double* energy = fit.entry(fit.normal, group, group);
    double* size = fit.size + group * count;
    for (std::int64_t lane = 0; lane < count; ++lane) {
      size[lane] = energy[lane] > 0 ? __builtin_sqrt(energy[lane]) : 1.0;
      fit.change[group * count + lane] = fit.slope[group * count + lane] / size[lane];
    }
  }
  bool failed[count];
  factor_normal<T>(fit, failed);
  for (std::int64_t group = 0; group < fit.groups; ++group) {
    double* left = fit.change + group * count;
    for (std::int64_t k = 0; k < group; ++k) {
      const double *factor = fit.entry(fit.factor, group, k), *solved = fit.change + k * count;
      for (std::int64_t lane = 0; lane < count; ++lane) left[lane] -= factor[lane] * solved[lane];
    }
    for (std::int64_t lane = 0; lane < count; ++lane) left[lane] /= fit.entry(fit.factor, group, group)[lane];
  }
  for (std::int64_t group = fit.groups - 1; group >= 0; --group) {
    double* left = fit.change + group * count;
    for (std::int64_t k = group + 1; k < fit.groups; ++k) {
      const double *factor = fit.entry(fit.factor, k, group), *solved = fit.change + k * count;
      for (std::int64_t lane = 0; lane < count; ++lane) left[lane] -= factor[lane] * solved[lane];
    }
    for (std::int64_t lane = 0; lane < count; ++lane) left[lane] /= fit.entry(fit.factor, group, group)[lane];
  }
  for (std::int64_t group = 0; group < fit.groups; ++group) {
    const double* energy = fit.entry(fit.normal, group, group);
    for (std::int64_t lane = 0; lane < count; ++lane) {
      const double change = fit.change[group * count + lane] / fit.size[group * count + lane];
      const bool known = !failed[lane] && energy[lane] > 0 && change - change == 0;
      fit.change[group * count + lane] = known ? change : 0.0;
    }
  }
}

// Take the rounded solution in the lanes that lose less with it, and bring the slope to the scales that are taken.
template <class T>
void take_better(const Fit<T>& fit) {
  constexpr std::int64_t count = Lanes<T>::count;
  double gain[count] = {};
  for (std::int64_t group = 0; group < fit.groups; ++group) {
    const std::int64_t place = group * count;
    guarded<T>(fit.before + place, fit.before + place, fit.change + place, fit.scale + place);
    for (std::int64_t lane = 0; lane < count; ++lane) {
      fit.change[place + lane] = fit.scale[place + lane] - fit.before[place + lane];
    }
  }
  // `size` is done with: here it is the normal matrix times the change.
  for (std::int64_t group = 0; group < fit.groups; ++group) {
    double* moved = fit.size + group * count;
    for (std::int64_t lane = 0; lane < count; ++lane) moved[lane] = 0;
    for (std::int64_t k = 0; k < fit.groups; ++k) {
      const double *normal = fit.entry(fit.normal, group, k), *change = fit.change + k * count;
      for (std::int64_t lane = 0; lane < count; ++lane) moved[lane] += normal[lane] * change[lane];
    }
    for (std::int64_t lane = 0; lane < count; ++lane) {
      gain[lane] += (2 * fit.slope[group * count + lane] - moved[lane]) * fit.change[group * count + lane];
    }
  }
  for (std::int64_t group = 0; group < fit.groups; ++group) {
    for (std::int64_t lane = 0; lane < count; ++lane) {
      const std::int64_t place = group * count + lane;
      fit.scale[place] = gain[lane] > 0 ? fit.scale[place] : fit.before[place];
      fit.slope[place] -= gain[lane] > 0 ? fit.size[place] : 0.0;
    }
  }
}

// Let every scale in turn move to the best storable one beside all others.
template <class T>
void settle(const Fit<T>& fit) {
  constexpr std::int64_t count = Lanes<T>::count;
  for (int index = 0; index < kRoundedSweeps; ++index) {
    for (std::int64_t group = 0; group < fit.groups; ++group) {
      const double* energy = fit.entry(fit.normal, group, group);
      double *slope = fit.slope + group * count, *scale = fit.scale + group * count, change[count], moved[count];
      for (std::int64_t lane = 0; lane < count; ++lane) {
        change[lane] = energy[lane] > 0 ? slope[lane] / energy[lane] : 0.0;
      }
      guarded<T>(fit.before + group * count, scale, change, moved);
      for (std::int64_t lane = 0; lane < count; ++lane) {
        const double step = moved[lane] - scale[lane];
        change[lane] = (2 * slope[lane] - energy[lane] * step) * step > 0 ? step : 0.0;
        scale[lane] += change[lane];
      }
      for (std::int64_t k = 0; k < fit.groups; ++k) {
        const double* normal = fit.entry(fit.normal, k, group);
        for (std::int64_t lane = 0; lane < count; ++lane) fit.slope[k * count + lane] -= normal[lane] * change[lane];
      }
    }
  }
}

// Write what each row loses less with the scales of `fit` than with those of before; `slope` is that of now.
template <class T>
void find_gain(const Fit<T>& fit, double* gain) {
  constexpr std::int64_t count = Lanes<T>::count;
  for (std::int64_t lane = 0; lane < count; ++lane) gain[lane] = 0;
  for (std::int64_t group = 0; group < fit.groups; ++group) {
    double moved[count] = {};
    for (std::int64_t k = 0; k < fit.groups; ++k) {
      const double* normal = fit.entry(fit.normal, group, k);
      const std::int64_t place = k * count;
      for (std::int64_t lane = 0; lane < count; ++lane) {
        moved[lane] += normal[lane] * (fit.scale[place + lane] - fit.before[place + lane]);
      }
    }
    for (std::int64_t lane = 0; lane < count; ++lane) {
      const std::int64_t place = group * count + lane;
      gain[lane] += (2 * fit.slope[place] + moved[lane]) * (fit.scale[place] - fit.before[place]);
    }
  }
}

// Refit the scales to the steps; `tile.error` is that of the scales of before. Returns whether a scale changed. With a
// known slope, `tile.slope` is read, and `gain` `[W, lanes]` written.
template <class T, int W, bool SlopeIsKnown = false>
bool refit(const RefineCall& call, const RefineTile<T>& tile, double* gain = nullptr) {
  constexpr std::int64_t count = Lanes<T>::count;
  const std::int64_t groups = num_groups(call);
  const Fit<T> fit(tile.fit, groups);
  bool changed = false;
  normal_equations<T, W, SlopeIsKnown>(call, tile);
  for (int w = 0; w < W; ++w) {
    for (std::int64_t group = 0; group < groups; ++group) {
      for (std::int64_t lane = 0; lane < count; ++lane) {
        fit.slope[group * count + lane] = tile.slope[group * W + w][lane];
        fit.before[group * count + lane] = tile.scale[group * W + w][lane];
      }
      for (std::int64_t k = group; k < groups; ++k) {
        double *above = fit.entry(fit.normal, group, k), *below = fit.entry(fit.normal, k, group);
        for (std::int64_t lane = 0; lane < count; ++lane) {
          above[lane] = below[lane] = tile.normal[(group * groups + k) * W + w][lane];
        }
      }
    }
    solve_change<T>(fit);
    take_better<T>(fit);
    settle<T>(fit);
    if (SlopeIsKnown) find_gain<T>(fit, gain + w * count);
    for (std::int64_t group = 0; group < groups; ++group) {
      auto& scale = tile.scale[group * W + w];
      for (std::int64_t lane = 0; lane < count; ++lane) {
        changed |= fit.scale[group * count + lane] != fit.before[group * count + lane];
        scale[lane] = static_cast<T>(fit.scale[group * count + lane]);
      }
      tile.inverse[group * W + w] = T(1) / scale;
    }
  }
  return changed;
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
