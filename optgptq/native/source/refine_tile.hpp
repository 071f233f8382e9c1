// All rounds of refinement for one tile of rows. The definition is `optgptq/solvers/lanes.py`. Included once by each
// instruction set.
#pragma once

#include "descend.hpp"
#include "lanes.hpp"
#include "refine.hpp"
#include "refit.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

template <class T>
RefineTile<T> refine_tile_in(const RefineCall& call, void* scratch, std::int64_t vectors) {
  using V = typename Lanes<T>::Vector;
  const std::int64_t columns = call.num_columns * vectors, groups = num_groups(call) * vectors;
  RefineTile<T> tile;
  tile.target = static_cast<V*>(scratch);
  tile.steps = tile.target + columns;
  tile.error = tile.steps + columns;
  tile.gradient = tile.error + columns;
  tile.scale = tile.gradient + kBlock * vectors;
  tile.inverse = tile.scale + groups;
  tile.lowest = tile.inverse + groups;
  tile.highest = tile.lowest + groups;
  tile.slope = tile.highest + groups;
  tile.normal = tile.slope + groups;
  tile.fit = reinterpret_cast<double*>(tile.normal + groups * num_groups(call));
  return tile;
}

template <class T>
std::size_t refine_bytes(const RefineCall& call, std::int64_t vectors) {
  using V = typename Lanes<T>::Vector;
  const std::int64_t groups = num_groups(call);
  const std::int64_t number = (3 * call.num_columns + kBlock + groups * (5 + groups)) * vectors;
  return sizeof(V) * static_cast<std::size_t>(number) + sizeof(double) * static_cast<std::size_t>(Fit<T>::numbers(groups));
}

// Returns how many lanes of a vector have a row.
OPTGPTQ_INLINE std::int64_t lanes_left(const RefineCall& call, std::int64_t begin, std::int64_t count) {
  const std::int64_t rest = call.num_rows - begin;
  return rest >= count ? count : rest > 0 ? rest : 0;
}

template <class T, int W>
void load_rows(const RefineCall& call, const RefineTile<T>& tile, std::int64_t begin) {
  constexpr std::int64_t count = Lanes<T>::count;
  for (int w = 0; w < W; ++w) {
    const std::int64_t first = begin + w * count, lanes = lanes_left(call, first, count);
    const std::int64_t from = lanes > 0 ? first : 0;
    for (std::int64_t column = 0; column < call.num_columns; ++column) {
      const std::int64_t place = column * call.num_rows + from;
      tile.target[column * W + w] = load<T>(static_cast<const T*>(call.target) + place, lanes);
      tile.steps[column * W + w] = load<T>(static_cast<const T*>(call.steps) + place, lanes);
    }
    for (std::int64_t group = 0; group < num_groups(call); ++group) {
      const std::int64_t place = group * call.num_rows + from, index = group * W + w;
      tile.scale[index] = load<T>(static_cast<const T*>(call.scale) + place, lanes);
      // Lanes without a row divide by one.
      for (std::int64_t lane = lanes; lane < count; ++lane) tile.scale[index][lane] = T(1);
      tile.inverse[index] = T(1) / tile.scale[index];
      tile.lowest[index] = load<T>(static_cast<const T*>(call.lowest) + place, lanes);
      tile.highest[index] = load<T>(static_cast<const T*>(call.highest) + place, lanes);
    }
  }
}

template <class T, int W>
void store_rows(const RefineCall& call, const RefineTile<T>& tile, std::int64_t begin) {
  constexpr std::int64_t count = Lanes<T>::count;
  for (int w = 0; w < W; ++w) {
    const std::int64_t first = begin + w * count, lanes = lanes_left(call, first, count);
    if (lanes == 0) break;
    for (std::int64_t column = 0; column < call.num_columns; ++column) {
      store<T>(static_cast<T*>(call.steps) + column * call.num_rows + first, tile.steps[column * W + w], lanes);
    }
    for (std::int64_t group = 0; group < num_groups(call); ++group) {
      store<T>(static_cast<T*>(call.scale) + group * call.num_rows + first, tile.scale[group * W + w], lanes);
    }
  }
}

template <class T, int W>
bool refine_rows(const RefineCall& call, const RefineTile<T>& tile, std::int64_t begin) {
  load_rows<T, W>(call, tile, begin);
  bool changed = false;
  for (std::int64_t round = 0; round < call.rounds; ++round) {
    find_error<T, W>(call, tile);
    bool moved = false;
    if (call.scale_refit && refit<T, W>(call, tile)) {
      moved = true;
      find_error<T, W>(call, tile);
    }
    for (std::int64_t index = 0; index < call.code_sweeps && sweep<T, W>(call, tile); ++index) moved = true;
    changed |= moved;
    if (!moved) break;
    if (call.scale_refit && call.code_sweeps > 0 && round + 1 == call.rounds) {
      find_error<T, W>(call, tile);
      refit<T, W>(call, tile);
    }
    if (call.code_sweeps == 0) break;
  }
  if (changed) store_rows<T, W>(call, tile, begin);
  return changed;
}

template <class T>
bool refine_tile(const RefineCall& call, void* scratch, std::int64_t begin, std::int64_t vectors) {
  const RefineTile<T> tile = refine_tile_in<T>(call, scratch, vectors);
  if (vectors == 1) return refine_rows<T, 1>(call, tile, begin);
  return refine_rows<T, kWide>(call, tile, begin);
}

}  // namespace

RefinePath<float> refine_float() { return {Lanes<float>::count, kWide, refine_bytes<float>, refine_tile<float>}; }
RefinePath<double> refine_double() { return {Lanes<double>::count, kWide, refine_bytes<double>, refine_tile<double>}; }

}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
