// Levels of binary codes, and coefficients fitted to codes, for one tile of rows. The definition is
// `optgptq/solvers/levels.py`. Included once by each instruction set.
#pragma once

#include "binary.hpp"
#include "lanes.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {
namespace binary {

constexpr double kLeastPivot = 1e-4;
constexpr float kLargestHalf = 65504.0f;
constexpr float kLargestByte = 127.0f;
constexpr int kMaxLevels = 16;

template <class T>
struct Codes {
  typedef std::uint8_t Vector __attribute__((vector_size(Lanes<T>::count)));
};

template <class T>
OPTGPTQ_INLINE typename Lanes<T>::Vector load_codes(const std::uint8_t* from, std::int64_t num_lanes) {
  typename Codes<T>::Vector codes{};
  if (num_lanes == Lanes<T>::count) {
    __builtin_memcpy(&codes, from, sizeof codes);
  } else {
    for (std::int64_t lane = 0; lane < num_lanes; ++lane) codes[lane] = from[lane];
  }
  return __builtin_convertvector(codes, typename Lanes<T>::Vector);
}

template <class M>
OPTGPTQ_INLINE bool any(M mask) {
  std::uint64_t words[sizeof mask / 8], found = 0;
  __builtin_memcpy(words, &mask, sizeof mask);
  for (const std::uint64_t word : words) found |= word;
  return found != 0;
}

template <class F, class I>
OPTGPTQ_INLINE F half_float(F value) {
  const F zero{};
  const F bounded = smaller(larger(value, zero - kLargestHalf), zero + kLargestHalf);
  I bits = (I)bounded;
  // Halves to even, in the upper 19 bits.
  bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fff;
  // Float16 below 2^-14 is multiples of 2^-24, which is the spacing of float32 around 0.75.
  const F coarse = (bounded + 0.75f) - 0.75f;
  return magnitude(bounded) < 0x1p-14f ? coarse : (F)bits;
}

OPTGPTQ_INLINE FloatVector half_precision(FloatVector value) { return half_float<FloatVector, IntVector>(value); }

OPTGPTQ_INLINE DoubleVector half_precision(DoubleVector value) {
  const HalfFloatVector single = __builtin_convertvector(value, HalfFloatVector);
  return __builtin_convertvector((half_float<HalfFloatVector, HalfIntVector>(single)), DoubleVector);
}

// The table of a tile and, in its place, what its entries are multiplied by.
template <class T, int K, int B>
struct Table {
  using V = typename Lanes<T>::Vector;
  V entry[K][B - 1];

  Table(const BinaryTable& table, std::int64_t begin, std::int64_t num_lanes) {
    const T* entries = static_cast<const T*>(table.entries);
    for (int k = 0; k < K; ++k) {
      for (int b = 0; b < B - 1; ++b) {
        const T* from = entries + (k * B + b) * table.num_entries;
        entry[k][b] = table.num_entries == 1 ? V{} + from[0] : load<T>(from + begin, num_lanes);
      }
    }
  }

  OPTGPTQ_INLINE void levels(const V* coefficient, V* level) const {
    for (int k = 0; k < K; ++k) {
      level[k] = entry[k][0] * coefficient[0];
      for (int b = 1; b < B - 1; ++b) level[k] += entry[k][b] * coefficient[b];
      level[k] += coefficient[B - 1];
    }
  }

  // The table's entries for codes, without the one that is always one.
  OPTGPTQ_INLINE void columns(V code, V* column) const {
    for (int b = 0; b < B - 1; ++b) column[b] = entry[0][b];
    for (int k = 1; k < K; ++k) {
      const auto is_it = code == T(k);
      for (int b = 0; b < B - 1; ++b) column[b] = is_it ? entry[k][b] : column[b];
    }
  }
};

// The nearest of `K` levels by halves; of two equally near the smaller code.
template <class T, int K>
struct Nearest {
  using V = typename Lanes<T>::Vector;
  V distance, level, code;

  OPTGPTQ_INLINE Nearest(V value, const V* levels, int first = 0) {
    const Nearest<T, K / 2> low(value, levels, first), high(value, levels + K / 2, first + K / 2);
    const auto is_nearer = high.distance < low.distance;
    distance = smaller(high.distance, low.distance);
    level = is_nearer ? high.level : low.level;
    code = is_nearer ? high.code : low.code;
  }
};

template <class T>
struct Nearest<T, 1> {
  using V = typename Lanes<T>::Vector;
  V distance, level, code;

  OPTGPTQ_INLINE Nearest(V value, const V* levels, int first = 0)
      : distance(magnitude(value - levels[0])), level(levels[0]), code(V{} + T(first)) {}
};

template <class T, int B>
struct Fit {
  using V = typename Lanes<T>::Vector;
  V normal[B][B];
  V slope[B];

  // Write `normal^-1 slope`; what the coefficients before it explain stays.
  void best_change(V* change) const {
    V scale[B], inverse[B], left[B][B];
    for (int b = 0; b < B; ++b) {
      for (std::int64_t lane = 0; lane < Lanes<T>::count; ++lane) {
        const T energy = normal[b][b][lane];
        scale[b][lane] = energy > T(0) ? T(1) / static_cast<T>(__builtin_sqrt(energy)) : T(0);
      }
    }
    for (int a = 0; a < B; ++a) {
      for (int b = 0; b < B; ++b) left[a][b] = normal[a][b] * scale[a] * scale[b];
      change[a] = slope[a] * scale[a];
    }
    for (int pivot = 0; pivot < B; ++pivot) {
      const V size = left[pivot][pivot];
      inverse[pivot] = size > T(kLeastPivot) ? T(1) / size : V{};
      for (int row = pivot + 1; row < B; ++row) {
        const V share = left[row][pivot] * inverse[pivot];
        for (int b = pivot + 1; b < B; ++b) left[row][b] -= share * left[pivot][b];
        change[row] -= share * change[pivot];
      }
    }
    for (int pivot = B - 1; pivot >= 0; --pivot) {
      V later{};
      for (int b = pivot + 1; b < B; ++b) later += left[pivot][b] * change[b];
      change[pivot] = (change[pivot] - later) * inverse[pivot];
    }
    for (int b = 0; b < B; ++b) change[b] *= scale[b];
  }

  OPTGPTQ_INLINE void mirror() {
    for (int a = 1; a < B; ++a) {
      for (int b = 0; b < a; ++b) normal[a][b] = normal[b][a];
    }
  }
};

template <int N>
struct Size {
  static constexpr int value = N;
};

// Call `work(levels, coefficients)` with the sizes of a table, known when compiled.
template <class Work>
OPTGPTQ_INLINE void with_sizes(const BinaryTable& table, const Work& work) {
  const bool is_shape = table.num_coefficients == 2;
  switch (table.num_levels) {
    case 2: return work(Size<2>(), Size<2>());
    case 4: return is_shape ? work(Size<4>(), Size<2>()) : work(Size<4>(), Size<3>());
    case 8: return is_shape ? work(Size<8>(), Size<2>()) : work(Size<8>(), Size<4>());
    default: return is_shape ? work(Size<16>(), Size<2>()) : work(Size<16>(), Size<5>());
  }
}

template <class T>
void nearest_rows(const BinaryNearestCall& call, std::int64_t begin, std::int64_t num_lanes) {
  using V = typename Lanes<T>::Vector;
  V level[kMaxLevels];
  for (std::int64_t k = 0; k < call.num_levels; ++k) {
    level[k] = load<T>(static_cast<const T*>(call.level) + k * call.num_rows + begin, num_lanes);
  }
  for (std::int64_t column = 0; column < call.num_columns; ++column) {
    const std::int64_t place = column * call.num_rows + begin;
    const V weight = load<T>(static_cast<const T*>(call.weight) + place, num_lanes);
    V distance = magnitude(weight - level[0]), error = weight - level[0];
    for (std::int64_t k = 1; k < call.num_levels; ++k) {
      const V missed = weight - level[k];
      const auto is_nearer = magnitude(missed) < distance;
      distance = smaller(magnitude(missed), distance);
      error = is_nearer ? missed : error;
    }
    store<T>(static_cast<T*>(call.error) + place, error, num_lanes);
  }
}

template <class T>
void nearest_tile(const BinaryNearestCall& call, std::int64_t index) {
  const std::int64_t begin = index * Lanes<T>::count, rest = call.num_rows - begin;
  nearest_rows<T>(call, begin, rest < Lanes<T>::count ? rest : Lanes<T>::count);
}

}  // namespace binary
}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
