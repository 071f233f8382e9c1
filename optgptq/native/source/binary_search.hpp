// Which binary code a group asks for, for one tile of rows. The definition is `optgptq/grids/binary_search.py`.
// Included once by each instruction set.
#pragma once

#include "binary.hpp"
#include "binary_gaps.hpp"
#include "binary_levels.hpp"
#include "lanes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {
namespace binary {

template <class T, int K>
OPTGPTQ_INLINE void gaps_of_shape(
    const BinarySearchCall& call, const SearchTile<T>& tile, std::int64_t shape,
    const typename Lanes<T>::Vector** gaps) {
  for (int k = 0; k < K; ++k) gaps[k] = tile.gaps + call.places[shape * K + k];
}

template <class V, int K>
OPTGPTQ_INLINE V code_cost(const V* const* gaps, std::int64_t offset) {
  V cost = gaps[0][offset];
  for (int k = 1; k < K; ++k) cost += gaps[k][offset];
  return cost;
}

template <class T, int K>
OPTGPTQ_INLINE typename Lanes<T>::Vector least_of_shape(
    const BinarySearchCall& call, const SearchTile<T>& tile, std::int64_t shape) {
  using V = typename Lanes<T>::Vector;
  V least = V{} + T(__builtin_inf());
  const V* gaps[K];
  gaps_of_shape<T, K>(call, tile, shape, gaps);
  const std::int64_t num_offsets = call.num_offsets[shape];
  for (std::int64_t offset = 0; offset < num_offsets; ++offset) least = smaller(least, code_cost<V, K>(gaps, offset));
  return least;
}

template <class T, int K>
typename Lanes<T>::Vector least_cost(const BinarySearchCall& call, const SearchTile<T>& tile) {
  using V = typename Lanes<T>::Vector;
  V least = V{} + T(__builtin_inf());
  for (std::int64_t shape = 0; shape < call.num_shapes; ++shape) {
    least = smaller(least, least_of_shape<T, K>(call, tile, shape));
  }
  return least;
}

// What the code of a row's own shape costs, summed as `code_cost` does.
template <class T, int K>
OPTGPTQ_INLINE T own_cost(
    const SearchTile<T>& tile, const std::int64_t* places, std::int64_t offset, std::int64_t lane) {
  T cost = tile.gaps[places[0] + offset][lane];
  for (int k = 1; k < K; ++k) cost += tile.gaps[places[k] + offset][lane];
  return cost;
}

template <class T, int K>
typename Lanes<T>::Vector least_own_cost(
    const BinarySearchCall& call, const SearchTile<T>& tile, std::int64_t begin, std::int64_t num_lanes) {
  typename Lanes<T>::Vector least{};
  for (std::int64_t lane = 0; lane < num_lanes; ++lane) {
    const std::int64_t shape = call.shapes[begin + lane];
    T best = T(__builtin_inf());
    for (std::int64_t offset = 0; offset < call.num_offsets[shape]; ++offset) {
      const T cost = own_cost<T, K>(tile, call.places + shape * K, offset, lane);
      best = cost < best ? cost : best;
    }
    least[lane] = best;
  }
  return least;
}

// Write the first offset of each row's own shape whose cost is no larger than `bound`.
template <class T, int K>
void first_own_code(
    const BinarySearchCall& call, const SearchTile<T>& tile, typename Lanes<T>::Vector bound, std::int64_t begin,
    std::int64_t num_lanes) {
  for (std::int64_t lane = 0; lane < num_lanes; ++lane) {
    const std::int64_t shape = call.shapes[begin + lane], most = call.num_offsets[shape];
    std::int64_t offset = 0;
    while (offset < most && !(own_cost<T, K>(tile, call.places + shape * K, offset, lane) <= bound[lane])) ++offset;
    call.index[begin + lane] = offset < most ? offset : 0;
  }
}

// Write the first code whose cost is no larger than `bound`.
template <class T, int K>
void first_code(
    const BinarySearchCall& call, const SearchTile<T>& tile, typename Lanes<T>::Vector bound, std::int64_t begin,
    std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  std::int64_t code = 0, left = num_lanes;
  bool found[Lanes<T>::count] = {};
  for (std::int64_t lane = 0; lane < num_lanes; ++lane) call.index[begin + lane] = 0;
  for (std::int64_t shape = 0; shape < call.num_shapes; ++shape) {
    const V* gaps[K];
    gaps_of_shape<T, K>(call, tile, shape, gaps);
    for (std::int64_t offset = 0; offset < call.num_offsets[shape]; ++offset, ++code) {
      if (!any(code_cost<V, K>(gaps, offset) <= bound)) continue;
      const V cost = code_cost<V, K>(gaps, offset);
      for (std::int64_t lane = 0; lane < num_lanes; ++lane) {
        if (found[lane] || !(cost[lane] <= bound[lane])) continue;
        call.index[begin + lane] = code;
        found[lane] = true;
        if (--left == 0) return;
      }
    }
  }
}

template <class T, int K>
void price_shapes(
    const BinarySearchCall& call, const SearchTile<T>& tile, std::int64_t begin, std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  const T* factors = static_cast<const T*>(call.factors);
  const FullRange<T> range(call, tile);
  for (std::int64_t shape = 0; shape < call.num_shapes; ++shape) tile.shapes[shape] = V{} + T(__builtin_inf());
  for (std::int64_t index = 0; index < call.num_factors; ++index) {
    const V tried = factors[index] * range.scale, square = tried * tried;
    const V squares = fill_bins<T>(call, tile, tried, range.zero);
    find_gaps<T>(call, tile);
    for (std::int64_t shape = 0; shape < call.num_shapes; ++shape) {
      const V cost = (least_of_shape<T, K>(call, tile, shape) + squares) * square;
      tile.shapes[shape] = smaller(cost, tile.shapes[shape]);
    }
  }
  T* to = static_cast<T*>(call.shape_cost) + begin;
  for (std::int64_t shape = 0; shape < call.num_shapes; ++shape) {
    store<T>(to + shape * call.num_rows, tile.shapes[shape], num_lanes);
  }
}

template <class T, int K>
void search_levels(
    const BinarySearchCall& call, const SearchTile<T>& tile, std::int64_t begin, std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  if (call.shape_cost != nullptr) return price_shapes<T, K>(call, tile, begin, num_lanes);
  const bool has_own = call.shapes != nullptr;
  const auto least = [&] {
    return has_own ? least_own_cost<T, K>(call, tile, begin, num_lanes) : least_cost<T, K>(call, tile);
  };
  const T* factors = static_cast<const T*>(call.factors);
  const FullRange<T> range(call, tile);
  const V zero = range.zero;
  V best = V{} + T(__builtin_inf()), scale = V{} + T(1);
  for (std::int64_t index = 0; index < call.num_factors; ++index) {
    const V tried = factors[index] * range.scale, square = tried * tried;
    const V squares = fill_bins<T>(call, tile, tried, zero);
    find_gaps<T>(call, tile);
    const V cost = (least() + squares) * square;
    const auto better = cost < best - T(call.tolerance) * square;
    best = better ? cost : best;
    scale = better ? tried : scale;
  }
  fill_bins<T>(call, tile, scale, zero);
  find_gaps<T>(call, tile);
  const V bound = least() + T(call.tolerance);
  if (has_own) {
    first_own_code<T, K>(call, tile, bound, begin, num_lanes);
  } else {
    first_code<T, K>(call, tile, bound, begin, num_lanes);
  }
  store<T>(static_cast<T*>(call.scale) + begin, scale, num_lanes);
  store<T>(static_cast<T*>(call.zero) + begin, zero, num_lanes);
  store<T>(static_cast<T*>(call.cost) + begin, best, num_lanes);
}

template <class T>
void search_tile(const BinarySearchCall& call, void* scratch, std::int64_t index) {
  const SearchTile<T> tile = search_tile_in<T>(call, scratch);
  const std::int64_t begin = index * Lanes<T>::count, rest = call.num_rows - begin;
  const std::int64_t num_lanes = rest < Lanes<T>::count ? rest : Lanes<T>::count;
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const T* from = static_cast<const T*>(call.columns) + column * call.columns_stride + begin;
    tile.current[column] = load<T>(from, num_lanes);
  }
  switch (call.num_levels) {
    case 2: return search_levels<T, 2>(call, tile, begin, num_lanes);
    case 4: return search_levels<T, 4>(call, tile, begin, num_lanes);
    case 8: return search_levels<T, 8>(call, tile, begin, num_lanes);
    default: return search_levels<T, 16>(call, tile, begin, num_lanes);
  }
}

}  // namespace binary
}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
