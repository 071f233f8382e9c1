// Which range the grid of a group spans, for one tile of rows. The definition is `optgptq/grids/search.py`.
#pragma once

#include "group.hpp"
#include "lanes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

constexpr int kMaxShares = 12;
constexpr int kMaxFactors = 7;
constexpr int kMaxCandidates = 2 * kMaxShares + 3 * kMaxFactors;

template <class T>
struct Grids {
  using V = typename Lanes<T>::Vector;
  V scale[kMaxCandidates];
  V zero_point[kMaxCandidates];
  V cost[kMaxCandidates];
};

// Price `N` candidates from `first` on. A weight is multiplied by the reciprocal of the scale: the walk divides, but
// here only which of two equally distant levels is met could differ, and both cost the same.
template <class T, int N>
OPTGPTQ_INLINE void price_some(
    const GroupCall& call, const typename Lanes<T>::Vector* current, Grids<T>& grids, int first) {
  using V = typename Lanes<T>::Vector;
  const T* price = static_cast<const T*>(call.price);
  V inverse[N], lowest[N], highest[N], sum[N];
  for (int n = 0; n < N; ++n) {
    inverse[n] = T(1) / grids.scale[first + n];
    lowest[n] = -grids.zero_point[first + n];
    highest[n] = T(call.max_code) - grids.zero_point[first + n];
    sum[n] = V{};
  }
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const V weight = current[column];
    const T paid = price[column];
    for (int n = 0; n < N; ++n) {
      const V scaled = weight * inverse[n];
      const V step = rounded<T>(smaller(larger(scaled, lowest[n]), highest[n]));
      const V error = scaled - step;
      sum[n] += (error * paid) * error;
    }
  }
  for (int n = 0; n < N; ++n) {
    grids.cost[first + n] = sum[n] * (grids.scale[first + n] * grids.scale[first + n]);
  }
}

template <class T>
void price_all(const GroupCall& call, const typename Lanes<T>::Vector* current, Grids<T>& grids, int first, int end) {
  // As many as the registers of the instruction set hold with their ranges and sums.
  constexpr int kTogether = OPTGPTQ_VECTOR_BYTES == 64 ? 6 : 3;
  for (; first + kTogether <= end; first += kTogether) price_some<T, kTogether>(call, current, grids, first);
  for (; first < end; ++first) price_some<T, 1>(call, current, grids, first);
}

template <class T>
OPTGPTQ_INLINE typename Lanes<T>::Vector allowed(const GroupCall& call, typename Lanes<T>::Vector zero_point) {
  using V = typename Lanes<T>::Vector;
  const V zero{};
  return smaller(larger(zero_point, zero + T(call.smallest_zero_point)), zero + T(call.max_code));
}

// Move the cheapest of `end` grids to `scale` and `zero_point`, and price it out of the next choice.
template <class T>
void take_cheapest(
    Grids<T>& grids, int end, typename Lanes<T>::Vector& scale, typename Lanes<T>::Vector& zero_point) {
  using V = typename Lanes<T>::Vector;
  using I = typename Lanes<T>::Index;
  const V never = V{} + T(__builtin_inf());
  V least = never;
  I chosen{};
  scale = grids.scale[0];
  zero_point = grids.zero_point[0];
  for (int candidate = 0; candidate < end; ++candidate) {
    const auto better = grids.cost[candidate] < least;
    least = better ? grids.cost[candidate] : least;
    scale = better ? grids.scale[candidate] : scale;
    zero_point = better ? grids.zero_point[candidate] : zero_point;
    chosen = better ? I{} + typename Lanes<T>::Integer(candidate) : chosen;
  }
  for (int candidate = 0; candidate < end; ++candidate) {
    grids.cost[candidate] =
        chosen == typename Lanes<T>::Integer(candidate) ? never : grids.cost[candidate];
  }
}

// floor and ceil by the nearest integer: the standard library's are calls where the instruction set has no rounding.
template <class T>
OPTGPTQ_INLINE typename Lanes<T>::Vector floor_of(typename Lanes<T>::Vector a) {
  const typename Lanes<T>::Vector near = rounded<T>(a);
  return near > a ? near - T(1) : near;
}

template <class T>
int coarse_grids(
    const GroupCall& call, typename Lanes<T>::Vector low, typename Lanes<T>::Vector high, Grids<T>& grids) {
  using V = typename Lanes<T>::Vector;
  const int count = static_cast<int>(call.num_shares);
  const T* shares = static_cast<const T*>(call.shares);
  const V full = (high - low) / T(call.max_code);
  for (int share = 0; share < count; ++share) {
    const V scale = storable(shares[share] * full);
    grids.scale[share] = scale;
    if (call.symmetric) {
      grids.scale[count + share] = -scale;
      grids.zero_point[share] = grids.zero_point[count + share] = V{} + T(call.symmetric_zero_point);
    } else {
      grids.scale[count + share] = scale;
      const V exact = -low * shares[share] / scale;
      grids.zero_point[share] = allowed<T>(call, floor_of<T>(exact));
      grids.zero_point[count + share] = allowed<T>(call, -floor_of<T>(-exact));
    }
  }
  return 2 * count;
}

template <class T>
int fine_grids(const GroupCall& call, Grids<T>& grids, int first) {
  using V = typename Lanes<T>::Vector;
  const int count = static_cast<int>(call.num_factors);
  const T* factors = static_cast<const T*>(call.factors);
  V scale, zero_point, cost[2 * kMaxShares];
  for (int candidate = 0; candidate < first; ++candidate) cost[candidate] = grids.cost[candidate];
  take_cheapest<T>(grids, first, scale, zero_point);
  for (int candidate = 0; candidate < first; ++candidate) grids.cost[candidate] = cost[candidate];
  const int num_shifts = call.symmetric ? 1 : 3;
  const T shifts[3] = {T(0), T(-1), T(1)};
  for (int shift = 0; shift < num_shifts; ++shift) {
    for (int factor = 0; factor < count; ++factor) {
      const int candidate = first + shift * count + factor;
      grids.scale[candidate] = storable(factors[factor] * scale);
      grids.zero_point[candidate] = call.symmetric ? zero_point : allowed<T>(call, zero_point + shifts[shift]);
    }
  }
  return first + num_shifts * count;
}

// Write the `call.count` best grids of the columns in `current`, the best one first.
template <class T>
void find_grids(
    const GroupCall& call, const typename Lanes<T>::Vector* current, Grids<T>& grids,
    typename Lanes<T>::Vector* scale, typename Lanes<T>::Vector* zero_point) {
  using V = typename Lanes<T>::Vector;
  V low = current[0], high = current[0];
  for (std::int64_t column = 1; column < call.num_columns; ++column) {
    low = smaller(low, current[column]);
    high = larger(high, current[column]);
  }
  if (call.symmetric) {
    high = larger(-low, high);
    low = -high;
  } else {
    low = smaller(low, V{});
    high = larger(high, V{});
  }
  if (call.num_shares == 0) {
    const V full = storable((high - low) / T(call.max_code));
    const V zero = call.symmetric ? V{} + T(call.symmetric_zero_point) : allowed<T>(call, rounded<T>(-low / full));
    for (std::int64_t k = 0; k < call.count; ++k) {
      scale[k] = full;
      zero_point[k] = zero;
    }
    return;
  }
  const int num_coarse = coarse_grids<T>(call, low, high, grids);
  price_all<T>(call, current, grids, 0, num_coarse);
  const int end = fine_grids<T>(call, grids, num_coarse);
  price_all<T>(call, current, grids, num_coarse, end);
  for (std::int64_t k = 0; k < call.count; ++k) take_cheapest<T>(grids, end, scale[k], zero_point[k]);
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
