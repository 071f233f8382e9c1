// Causal attention of bfloat16 numbers with sums in float32 (AVX512_BF16).
//
// Some queries of a head are worked on together: all scores of theirs, then their softmax, then the weighted values.
// Scores and sums are float32; weights, at most 1, are rounded to bfloat16 before they meet the values, as torch does.
// Keys are packed by vectors of 16 with pairs of features side by side, values by pairs of keys.
#include "causal_attention.hpp"

#include "threads.hpp"

#if defined(__x86_64__)
#include <cstring>

namespace optgptq {
namespace {

// Queries that are worked on together, with two vectors of keys or of features: 16 registers of sums.
constexpr std::int64_t kRows = 8;
constexpr std::int64_t kKeys = 32;
// Queries of an item, worked on tile by tile.
constexpr std::int64_t kRowsPerItem = 128;
// Multiplications below which a second thread costs more than it does.
constexpr double kWorkPerThread = 1e8;

struct Packed {
  std::uint32_t* keys;    // [B, K, vectors of keys, D / 2, 16]: pairs of features
  std::uint32_t* values;  // [B, K, pairs of keys, E]: pairs of keys
  std::int64_t num_keys;  // a multiple of kKeys; those beyond the last are zeros
  bool widened;           // numbers that meet these are float32: queries and weights
};

inline const std::uint16_t* place(const HeadNumbers& of, std::int64_t sequence, std::int64_t head) {
  return of.numbers + sequence * of.sequence_stride + head * of.head_stride;
}

inline std::uint32_t pair_at(const std::uint16_t* numbers) {
  std::uint32_t pair;
  std::memcpy(&pair, numbers, sizeof pair);
  return pair;
}

void pack(const CausalCall& call, const Packed& packed, std::int64_t index) {
  const std::int64_t sequence = index / call.num_kv_heads, head = index % call.num_kv_heads;
  const std::int64_t pairs = call.head_dim / 2, width = call.value_dim;
  const std::uint16_t* key = place(call.key, sequence, head);
  const std::uint16_t* value = place(call.value, sequence, head);
  std::uint32_t* keys = packed.keys + index * packed.num_keys * pairs;
  std::uint32_t* values = packed.values + index * packed.num_keys / 2 * width;
  for (std::int64_t token = 0; token < packed.num_keys; ++token) {
    std::uint32_t* to = keys + token / 16 * pairs * 16 + token % 16;
    const std::uint16_t* from = key + token * call.key.token_stride;
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
      to[16 * pair] = token < call.num_tokens ? pair_at(from + 2 * pair) : 0;
    }
  }
  for (std::int64_t token = 0; token < packed.num_keys; token += 2) {
    const std::uint16_t* first = value + token * call.value.token_stride;
    for (std::int64_t feature = 0; feature < width; ++feature) {
      const std::uint32_t low = token < call.num_tokens ? first[feature] : 0;
      const std::uint32_t high = token + 1 < call.num_tokens ? first[call.value.token_stride + feature] : 0;
      values[token / 2 * width + feature] = low | high << 16;
    }
  }
}

inline float widened(std::uint16_t number) {
  const std::uint32_t bits = std::uint32_t{number} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

OPTGPTQ_PAIRS_TARGET inline __m512 add_pairs(__m512 sum, __m512i vector, const std::uint16_t* pair) {
  return _mm512_dpbf16_ps(sum, (__m512bh)vector, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair_at(pair))));
}

// Add products of two numbers of each of `R` rows with `V` vectors of pairs to sums `[R, V]`.
template <int R, int V>
OPTGPTQ_PAIRS_TARGET inline void add_rows(
    __m512 (&sum)[R][V], const __m512i (&vectors)[V], const std::uint16_t* const* rows, std::int64_t place) {
  for (int row = 0; row < R; ++row) {
    for (int v = 0; v < V; ++v) sum[row][v] = add_pairs(sum[row][v], vectors[v], rows[row] + place);
  }
}

template <int R, int V>
OPTGPTQ_PAIRS_TARGET inline void add_rows(
    __m512 (&sum)[R][V], const __m512i (&vectors)[V], const float* const* rows, std::int64_t place) {
  __m512 wide[V];
  for (int v = 0; v < V; ++v) wide[v] = second_of(vectors[v]);
  for (int row = 0; row < R; ++row) {
    const __m512 number = _mm512_set1_ps(rows[row][place + 1]);
    for (int v = 0; v < V; ++v) sum[row][v] = _mm512_fmadd_ps(wide[v], number, sum[row][v]);
  }
  for (int v = 0; v < V; ++v) wide[v] = first_of(vectors[v]);
  for (int row = 0; row < R; ++row) {
    const __m512 number = _mm512_set1_ps(rows[row][place]);
    for (int v = 0; v < V; ++v) sum[row][v] = _mm512_fmadd_ps(wide[v], number, sum[row][v]);
  }
}

// Scores `[kRows, num_keys]`, before the scale.
template <class Number>
OPTGPTQ_PAIRS_TARGET void score(
    const Number* const* query, const std::uint32_t* keys, std::int64_t pairs, std::int64_t num_keys,
    float* scores, std::int64_t stride) {
  for (std::int64_t first = 0; first < num_keys; first += kKeys) {
    const std::uint32_t* left = keys + first * pairs;
    const std::uint32_t* right = left + 16 * pairs;
    __m512 sum[kRows][2];
    for (int row = 0; row < kRows; ++row) sum[row][0] = sum[row][1] = _mm512_setzero_ps();
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
      const __m512i both[2] = {_mm512_loadu_si512(left + 16 * pair), _mm512_loadu_si512(right + 16 * pair)};
      add_rows(sum, both, query, 2 * pair);
    }
    for (int row = 0; row < kRows; ++row) {
      _mm512_storeu_ps(scores + row * stride + first, sum[row][0]);
      _mm512_storeu_ps(scores + row * stride + first + 16, sum[row][1]);
    }
  }
}

// 2^x for x <= 0 within 2e-7 of itself; what is not a number stays none.
OPTGPTQ_PAIRS_TARGET inline __m512 power_of_two(__m512 x) {
  // In this order the result is `x` where it is not a number.
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  // Taylor series of e^(rest * log 2), |rest| <= 1/2.
  __m512 power = _mm512_set1_ps(1.540353e-4f);
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.333355815e-3f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(9.618129108e-3f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(5.550410866e-2f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(2.402265070e-1f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(6.931471806e-1f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(power, whole);
}

OPTGPTQ_PAIRS_TARGET inline void store_rounded(std::uint16_t* to, __m512 numbers) {
  const __m256bh rounded = _mm512_cvtneps_pbh(numbers);
  std::memcpy(to, &rounded, sizeof rounded);
}

OPTGPTQ_PAIRS_TARGET inline void store_rounded(float* to, __m512 numbers) {
  _mm512_storeu_ps(to, first_of(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(numbers))));
}

// Weights of the first `num_seen` keys rounded to bfloat16, zeros up to `num_keys`; returns their sum before that.
// `weights` may be `scores`.
template <class Number>
OPTGPTQ_PAIRS_TARGET float weigh(
    const float* scores, float factor, std::int64_t num_seen, std::int64_t num_keys, Number* weights) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  const std::int64_t whole = num_seen / 16 * 16;
  const auto rest = static_cast<__mmask16>((1u << (num_seen - whole)) - 1);
  __m512 top = _mm512_mask_loadu_ps(lowest, rest, scores + whole);
  for (std::int64_t key = 0; key < whole; key += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(scores + key));
  const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top)), scale = _mm512_set1_ps(factor);
  __m512 total = _mm512_setzero_ps();
  for (std::int64_t key = 0; key < num_keys; key += 16) {
    __m512 weight = _mm512_setzero_ps();
    if (key <= whole) {
      const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(scores + key), largest);
      weight = power_of_two(_mm512_mul_ps(below, scale));
      if (key == whole) weight = _mm512_maskz_mov_ps(rest, weight);
      total = _mm512_add_ps(total, weight);
    }
    store_rounded(weights + key, weight);
  }
  float lanes[16], sum = 0.0f;
  _mm512_storeu_ps(lanes, total);
  for (const float lane : lanes) sum += lane;
  return sum;
}

// Features `feature .. feature + 16 * F - 1` of the output of `num_rows` queries.
template <int F, class Number>
OPTGPTQ_PAIRS_TARGET inline void add_values(
    const Number* const* weights, const std::uint32_t* values, std::int64_t value_dim, std::int64_t num_keys,
    const float* totals, std::uint16_t* const* output, std::int64_t feature, std::int64_t num_rows) {
  __m512 sum[kRows][F];
  for (int row = 0; row < kRows; ++row) {
    for (int f = 0; f < F; ++f) sum[row][f] = _mm512_setzero_ps();
  }
  for (std::int64_t key = 0; key < num_keys; key += 2) {
    const std::uint32_t* from = values + key / 2 * value_dim + feature;
    __m512i value[F];
    for (int f = 0; f < F; ++f) value[f] = _mm512_loadu_si512(from + 16 * f);
    add_rows(sum, value, weights, key);
  }
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (int f = 0; f < F; ++f) {
      store_rounded(output[row] + feature + 16 * f, _mm512_div_ps(sum[row][f], _mm512_set1_ps(totals[row])));
    }
  }
}

// Some queries of one head: what they are, where their outputs go, and how many keys each sees.
struct Queries {
  const std::uint16_t* numbers[kRows];
  std::uint16_t* output[kRows];
  std::int64_t num_seen[kRows];
  std::int64_t num_rows;  // those beyond are the last once more
};

// Scratch of a worker: scores `[kRows, num_keys]`, and behind them weights or widened queries.
template <class Number>
void attend(
    const CausalCall& call, const Packed& packed, const Queries& queries, const Number* const* query,
    Number* const* weights, std::int64_t kv_head, float* scores) {
  const std::int64_t dim = call.value_dim, pairs = call.head_dim / 2, stride = packed.num_keys;
  const std::int64_t num_keys = (queries.num_seen[kRows - 1] + kKeys - 1) / kKeys * kKeys;
  float totals[kRows];
  score(query, packed.keys + kv_head * stride * pairs, pairs, num_keys, scores, stride);
  const auto factor = static_cast<float>(call.scale * 1.4426950408889634);
  for (std::int64_t row = 0; row < kRows; ++row) {
    totals[row] = weigh(scores + row * stride, factor, queries.num_seen[row], num_keys, weights[row]);
  }
  std::int64_t feature = 0;
  const std::uint32_t* values = packed.values + kv_head * stride / 2 * dim;
  for (; feature + 32 <= dim; feature += 32) {
    add_values<2>(weights, values, dim, num_keys, totals, queries.output, feature, queries.num_rows);
  }
  if (feature < dim) add_values<1>(weights, values, dim, num_keys, totals, queries.output, feature, queries.num_rows);
}

// Queries `first .. first + kRows - 1` of those of one head that count, as far as there are so many.
void attend_from(
    const CausalCall& call, const Packed& packed, std::int64_t sequence, std::int64_t head, std::int64_t first,
    float* scores) {
  const std::int64_t rest = call.num_queries - first, dim = call.head_dim, stride = packed.num_keys;
  const std::int64_t kv_head = sequence * call.num_kv_heads + head / (call.num_heads / call.num_kv_heads);
  Queries queries;
  queries.num_rows = rest < kRows ? rest : kRows;
  for (std::int64_t row = 0; row < kRows; ++row) {
    const std::int64_t index =
        sequence * call.num_queries + first + (row < queries.num_rows ? row : queries.num_rows - 1);
    const std::int64_t token = call.positions == nullptr ? index % call.num_tokens : call.positions[index];
    queries.numbers[row] = place(call.query, sequence, head) + token * call.query.token_stride;
    queries.output[row] = call.output + (index * call.num_heads + head) * call.value_dim;
    queries.num_seen[row] = token + 1;
  }
  float* behind = scores + kRows * stride;
  if (packed.widened) {
    const float* query[kRows];
    float* weights[kRows];
    for (std::int64_t row = 0; row < kRows; ++row) {
      float* numbers = behind + row * dim;
      for (std::int64_t feature = 0; feature < dim; ++feature) numbers[feature] = widened(queries.numbers[row][feature]);
      query[row] = numbers;
      weights[row] = scores + row * stride;
    }
    return attend(call, packed, queries, query, weights, kv_head, scores);
  }
  std::uint16_t* weights[kRows];
  for (std::int64_t row = 0; row < kRows; ++row) weights[row] = reinterpret_cast<std::uint16_t*>(behind) + row * stride;
  attend(call, packed, queries, queries.numbers, weights, kv_head, scores);
}

}  // namespace

bool causal_attention_bfloat16(const CausalCall& call, PairWay way, std::int64_t num_threads) {
  if (!has_bfloat16_products()) return false;
  const double scores = static_cast<double>(call.num_tokens) * static_cast<double>(call.num_queries);
  const double heads = static_cast<double>(call.num_sequences * call.num_heads);
  const double features = static_cast<double>(call.head_dim + call.value_dim) / 2;
  const auto worth = static_cast<std::int64_t>(scores * heads * features / kWorkPerThread) + 1;
  const std::int64_t workers = worth < num_threads ? worth : num_threads;
  const std::int64_t num_keys = (call.num_tokens + kKeys - 1) / kKeys * kKeys;
  const std::int64_t num_packed = call.num_sequences * call.num_kv_heads;
  const std::int64_t pairs = num_packed * num_keys * (call.head_dim / 2);
  const std::int64_t size = pairs + num_packed * num_keys / 2 * call.value_dim;
  const auto memory = aligned_memory(static_cast<std::size_t>(size) * sizeof(std::uint32_t));
  auto* numbers = static_cast<std::uint32_t*>(memory.get());
  const Packed packed{numbers, numbers + pairs, num_keys, widens(way)};
  share_out(num_packed, workers, [&](std::int64_t, std::int64_t index) { pack(call, packed, index); });
  // Scores and, behind them, weights of half their size or widened queries.
  const std::int64_t own = kRows * (num_keys + (packed.widened ? call.head_dim : num_keys / 2));
  const auto scratch = aligned_memory(static_cast<std::size_t>(workers * own) * sizeof(float));
  const std::int64_t parts = (call.num_queries + kRowsPerItem - 1) / kRowsPerItem;
  const std::int64_t num_heads = call.num_sequences * call.num_heads;
  share_out(num_heads * parts, workers, [&](std::int64_t worker, std::int64_t index) {
    float* scores = static_cast<float*>(scratch.get()) + worker * own;
    // The last parts take longest and come first.
    const std::int64_t head = index % num_heads, begin = (parts - 1 - index / num_heads) * kRowsPerItem;
    const std::int64_t rest = call.num_queries - begin, end = begin + (rest < kRowsPerItem ? rest : kRowsPerItem);
    for (std::int64_t first = begin; first < end; first += kRows) {
      attend_from(call, packed, head / call.num_heads, head % call.num_heads, first, scores);
    }
  });
  return true;
}

}  // namespace optgptq

#else

namespace optgptq {

bool causal_attention_bfloat16(const CausalCall&, PairWay, std::int64_t) { return false; }

}  // namespace optgptq

#endif

extern "C" __attribute__((visibility("default"))) int optgptq_causal_attention(
    const optgptq::CausalCall* call, optgptq::PairWay way, std::int64_t num_threads) {
  constexpr int done = 0, no_memory = 1, unsupported = 2;
  try {
    return optgptq::causal_attention_bfloat16(*call, way, num_threads) ? done : unsupported;
  } catch (const std::bad_alloc&) {
    return no_memory;
  }
}
