// Coordinate descent over the codes of one tile of rows. The definition is `optgptq/solvers/descend.py`. Included once
// by each instruction set.
#pragma once

#include "lanes.hpp"
#include "refine.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Columns whose gradient is one product with the error as it stands.
constexpr std::int64_t kBlock = 64;
// Vectors of a wide tile: with four rows of the moment their sums fit in the registers.
constexpr int kWide = OPTGPTQ_VECTOR_BYTES == 64 ? 4 : 2;

// Work space of a thread; `W` is the vectors of the tile.
template <class T>
struct RefineTile {
  using V = typename Lanes<T>::Vector;
  V* target;    // [I, W]
  V* steps;     // [I, W]
  V* error;     // [I, W], target minus level
  V* gradient;  // [kBlock, W]
  V* scale;     // [G, W]
  V* inverse;   // [G, W]
  V* lowest;    // [G, W]
  V* highest;   // [G, W]
  V* slope;     // [G, W]
  V* normal;    // [G, G, W], on and above the diagonal
  double* fit;  // what one vector's scales are solved in
};

template <class V>
OPTGPTQ_INLINE bool differ(V a, V b) {
  const auto different = a != b;
  std::uint64_t words[sizeof different / 8], any = 0;
  __builtin_memcpy(words, &different, sizeof different);
  for (const std::uint64_t word : words) any |= word;
  return any != 0;
}

#if OPTGPTQ_VECTOR_BYTES == 64
OPTGPTQ_INLINE bool differ(FloatVector a, FloatVector b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NEQ_UQ) != 0;
}
OPTGPTQ_INLINE bool differ(DoubleVector a, DoubleVector b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NEQ_UQ) != 0;
}
#endif

template <class T, int W, int J>
OPTGPTQ_INLINE void some_products(
    const T* moment, std::int64_t stride, const typename Lanes<T>::Vector* values, std::int64_t count,
    typename Lanes<T>::Vector* out) {
  using V = typename Lanes<T>::Vector;
  V sum[J][W];
  for (int j = 0; j < J; ++j) {
    for (int w = 0; w < W; ++w) sum[j][w] = V{};
  }
  for (std::int64_t k = 0; k < count; ++k) {
    for (int j = 0; j < J; ++j) {
      const T factor = moment[j * stride + k];
      for (int w = 0; w < W; ++w) sum[j][w] += values[k * W + w] * factor;
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int w = 0; w < W; ++w) out[j * W + w] = sum[j][w];
  }
}

// Write `num_rows` rows of the moment, `count` numbers of each, times `values` `[count, W]`.
template <class T, int W>
void products(
    const T* moment, std::int64_t stride, const typename Lanes<T>::Vector* values, std::int64_t count,
    std::int64_t num_rows, typename Lanes<T>::Vector* out) {
  // A single vector needs more rows, or each sum would wait for itself.
  constexpr int kTogether = W == 1 ? 8 : 4;
  std::int64_t row = 0;
  for (; row + kTogether <= num_rows; row += kTogether) {
    some_products<T, W, kTogether>(moment + row * stride, stride, values, count, out + row * W);
  }
  for (; row < num_rows; ++row) some_products<T, W, 1>(moment + row * stride, stride, values, count, out + row * W);
}

template <class T, int W>
void find_error(const RefineCall& call, const RefineTile<T>& tile) {
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const auto* scale = tile.scale + column / call.group_size * W;
    for (int w = 0; w < W; ++w) {
      tile.error[column * W + w] = tile.target[column * W + w] - tile.steps[column * W + w] * scale[w];
    }
  }
}

// Move the steps of one column to the best ones and hand the change on to the columns before `end`; `gradient` is
// that of the column. Returns whether a step changed.
template <class T, int W>
OPTGPTQ_INLINE bool descend_column(
    const RefineCall& call, const RefineTile<T>& tile, std::int64_t column, std::int64_t end,
    typename Lanes<T>::Vector* gradient) {
  using V = typename Lanes<T>::Vector;
  const T* moment = static_cast<const T*>(call.moment) + column * call.num_columns;
  if (!(moment[column] > T(0))) return false;
  const T inverse = T(1) / moment[column];
  const std::int64_t group = column / call.group_size * W;
  V change[W];
  bool moves = false;
  for (int w = 0; w < W; ++w) {
    V& step = tile.steps[column * W + w];
    const V nearest = rounded<T>(step + gradient[w] * tile.inverse[group + w] * inverse);
    const V best = smaller(larger(nearest, tile.lowest[group + w]), tile.highest[group + w]);
    moves |= differ(best, step);
    change[w] = (step - best) * tile.scale[group + w];
    step = best;
  }
  if (!moves) return false;
  for (int w = 0; w < W; ++w) tile.error[column * W + w] += change[w];
  for (std::int64_t later = 1; later < end - column; ++later) {
    const T factor = moment[column + later];
    for (int w = 0; w < W; ++w) gradient[later * W + w] += change[w] * factor;
  }
  return true;
}

// Visit every column once; returns whether a step changed.
template <class T, int W>
bool sweep(const RefineCall& call, const RefineTile<T>& tile) {
  const T* moment = static_cast<const T*>(call.moment);
  bool changed = false;
  for (std::int64_t begin = 0; begin < call.num_columns; begin += kBlock) {
    const std::int64_t end = begin + kBlock < call.num_columns ? begin + kBlock : call.num_columns;
    products<T, W>(
        moment + begin * call.num_columns, call.num_columns, tile.error, call.num_columns, end - begin, tile.gradient);
    for (std::int64_t column = begin; column < end; ++column) {
      changed |= descend_column<T, W>(call, tile, column, end, tile.gradient + (column - begin) * W);
    }
  }
  return changed;
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
