// Which binary code a group asks for, for one tile of rows. The definition is `optgptq/grids/binary_search.py`.
// Included once by each instruction set.
#pragma once

#include "binary.hpp"
#include "binary_levels.hpp"
#include "lanes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {
namespace binary {

// Two sums over the weights of one row that stand nearest to one whole number.
template <class T>
struct Bin {
  T price;
  T moment;
};

template <class T>
struct SearchTile {
  using V = typename Lanes<T>::Vector;
  V* current;    // [L]
  V* price_sum;  // [V], up to and with a number
  V* moment_sum;
  V* edge;    // [2 V], by the sum of two neighbouring levels
  V* gaps;    // by place
  Bin<T>* bins;  // [V, lanes]
};

inline std::int64_t num_gaps(std::int64_t max_number) { return (max_number + 1) * (max_number + 2) / 2; }

template <class T>
SearchTile<T> search_tile_in(const BinarySearchCall& call, void* scratch) {
  const std::int64_t numbers = call.max_number + 1;
  SearchTile<T> tile;
  tile.current = static_cast<typename Lanes<T>::Vector*>(scratch);
  tile.price_sum = tile.current + call.num_columns;
  tile.moment_sum = tile.price_sum + numbers;
  tile.edge = tile.moment_sum + numbers;
  tile.gaps = tile.edge + 2 * numbers;
  tile.bins = reinterpret_cast<Bin<T>*>(tile.gaps + num_gaps(call.max_number));
  return tile;
}

template <class T>
std::size_t search_bytes(const BinarySearchCall& call) {
  const std::int64_t numbers = call.max_number + 1;
  const std::int64_t vectors = call.num_columns + 4 * numbers + num_gaps(call.max_number) + 2 * numbers;
  return sizeof(typename Lanes<T>::Vector) * static_cast<std::size_t>(vectors);
}

// Fill the bins at one scale; returns `sum(price * place^2)`. Places count from the middle of the numbers: squares
// stay small.
template <class T>
typename Lanes<T>::Vector fill_bins(
    const BinarySearchCall& call, const SearchTile<T>& tile, typename Lanes<T>::Vector scale,
    typename Lanes<T>::Vector zero) {
  using V = typename Lanes<T>::Vector;
  using Integer = typename Lanes<T>::Integer;
  constexpr std::int64_t count = Lanes<T>::count;
  const T* price = static_cast<const T*>(call.price);
  const V lowest{}, highest = lowest + T(call.max_number);
  const T middle = T(call.max_number) / 2;
  V squares{};
  for (std::int64_t index = 0; index < (call.max_number + 1) * count; ++index) tile.bins[index] = {T(0), T(0)};
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const T paid = price[column];
    const V place = tile.current[column] / scale + zero;
    const V number = rounded<T>(larger(smaller(place, highest), lowest));
    const V moment = (place - middle) * paid;
    squares += moment * (place - middle);
    Integer numbers[count];
    T moments[count];
    const auto whole = __builtin_convertvector(number, typename Lanes<T>::Index);
    __builtin_memcpy(numbers, &whole, sizeof numbers);
    __builtin_memcpy(moments, &moment, sizeof moments);
    for (std::int64_t lane = 0; lane < count; ++lane) {
      Bin<T>& bin = tile.bins[numbers[lane] * count + lane];
      bin.price += paid;
      bin.moment += moments[lane];
    }
  }
  return squares;
}

// Write what a code pays for the gap between two neighbouring levels, at the place of its width and lower level, and
// what it pays for its highest level: with sums over all numbers nearer to the lower level than to the upper one,
//   width * (2 moment_sum - (lower + upper) price_sum),   highest^2 price_sum - 2 highest moment_sum.
template <class T>
void find_gaps(const BinarySearchCall& call, const SearchTile<T>& tile) {
  using V = typename Lanes<T>::Vector;
  constexpr std::int64_t count = Lanes<T>::count;
  const std::int64_t most = call.max_number;
  V price{}, moment{};
  for (std::int64_t number = 0; number <= most; ++number) {
    T prices[count], moments[count];
    for (std::int64_t lane = 0; lane < count; ++lane) {
      prices[lane] = tile.bins[number * count + lane].price;
      moments[lane] = tile.bins[number * count + lane].moment;
    }
    price += load<T>(prices, count);
    moment += load<T>(moments, count);
    tile.price_sum[number] = price;
    tile.moment_sum[number] = moment;
  }
  for (std::int64_t sum = 1; sum < 2 * most; ++sum) {
    // A number half-way belongs to the lower level.
    tile.edge[sum] = T(2) * tile.moment_sum[sum / 2] - T(sum - most) * tile.price_sum[sum / 2];
  }
  V* to = tile.gaps;
  for (std::int64_t width = 1; width <= most; ++width) {
    for (std::int64_t lower = 0; lower + width <= most; ++lower) *to++ = T(width) * tile.edge[2 * lower + width];
  }
  for (std::int64_t number = 0; number <= most; ++number) {
    const T highest = T(number) - T(most) / 2;
    *to++ = (highest * price - T(2) * moment) * highest;
  }
}

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
typename Lanes<T>::Vector least_cost(const BinarySearchCall& call, const SearchTile<T>& tile) {
  using V = typename Lanes<T>::Vector;
  V least = V{} + T(__builtin_inf());
  for (std::int64_t shape = 0; shape < call.num_shapes; ++shape) {
    const V* gaps[K];
    gaps_of_shape<T, K>(call, tile, shape, gaps);
    const std::int64_t num_offsets = call.num_offsets[shape];
    for (std::int64_t offset = 0; offset < num_offsets; ++offset) {
      least = smaller(least, code_cost<V, K>(gaps, offset));
    }
  }
  return least;
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
void search_levels(
    const BinarySearchCall& call, const SearchTile<T>& tile, std::int64_t begin, std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  const T* factors = static_cast<const T*>(call.factors);
  V low{}, high{};
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    low = smaller(tile.current[column], low);
    high = larger(tile.current[column], high);
  }
  const V full = larger((high - low) / T(call.max_number), V{} + T(call.smallest_scale));
  const V zero = rounded<T>(-low / full);
  V best = V{} + T(__builtin_inf()), scale = V{} + T(1);
  for (std::int64_t index = 0; index < call.num_factors; ++index) {
    const V tried = factors[index] * full, square = tried * tried;
    const V squares = fill_bins<T>(call, tile, tried, zero);
    find_gaps<T>(call, tile);
    const V cost = (least_cost<T, K>(call, tile) + squares) * square;
    const auto better = cost < best - T(call.tolerance) * square;
    best = better ? cost : best;
    scale = better ? tried : scale;
  }
  fill_bins<T>(call, tile, scale, zero);
  find_gaps<T>(call, tile);
  first_code<T, K>(call, tile, least_cost<T, K>(call, tile) + T(call.tolerance), begin, num_lanes);
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
