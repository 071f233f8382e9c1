// What the gaps between levels cost each row of a tile at one scale: the sums that all codes are priced by. The
// definition is `optgptq/grids/binary_search.py`.
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
  V* shapes;  // [S], what each costs, where that is asked for
  Bin<T>* bins;  // [V, lanes]
};

inline std::int64_t num_gaps(std::int64_t max_number) { return (max_number + 1) * (max_number + 2) / 2; }

inline std::int64_t num_priced_shapes(const BinarySearchCall& call) {
  return call.shape_cost == nullptr ? 0 : call.num_shapes;
}

template <class T>
SearchTile<T> search_tile_in(const BinarySearchCall& call, void* scratch) {
  const std::int64_t numbers = call.max_number + 1;
  SearchTile<T> tile;
  tile.current = static_cast<typename Lanes<T>::Vector*>(scratch);
  tile.price_sum = tile.current + call.num_columns;
  tile.moment_sum = tile.price_sum + numbers;
  tile.edge = tile.moment_sum + numbers;
  tile.gaps = tile.edge + 2 * numbers;
  tile.shapes = tile.gaps + num_gaps(call.max_number);
  tile.bins = reinterpret_cast<Bin<T>*>(tile.shapes + num_priced_shapes(call));
  return tile;
}

template <class T>
std::size_t search_bytes(const BinarySearchCall& call) {
  const std::int64_t numbers = call.max_number + 1;
  const std::int64_t vectors =
      call.num_columns + 4 * numbers + num_gaps(call.max_number) + num_priced_shapes(call) + 2 * numbers;
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

template <class T>
struct FullRange {
  using V = typename Lanes<T>::Vector;
  V scale, zero;

  FullRange(const BinarySearchCall& call, const SearchTile<T>& tile) {
    V low{}, high{};
    for (std::int64_t column = 0; column < call.num_columns; ++column) {
      low = smaller(tile.current[column], low);
      high = larger(tile.current[column], high);
    }
    scale = larger((high - low) / T(call.max_number), V{} + T(call.smallest_scale));
    zero = rounded<T>(-low / scale);
  }
};

}  // namespace binary
}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
