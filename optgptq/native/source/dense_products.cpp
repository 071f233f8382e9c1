// Dense products of bfloat16 numbers with sums in float32 (AVX512_BF16).
//
// Up to 12 tokens share each read of 32 rows: 24 registers of sums. Tokens are packed by pairs of columns first, those of
// a block side by side: rows a power of two apart would meet in the same few lines of the cache.
#include "dense_products.hpp"

#include "threads.hpp"

namespace optgptq {
namespace {

constexpr std::int64_t kGroupRows = 32;

inline std::int64_t pairs_of(std::int64_t num_columns) { return (num_columns + 1) / 2; }

inline std::int64_t groups_of(std::int64_t num_rows) { return (num_rows + kGroupRows - 1) / kGroupRows; }

}  // namespace

std::int64_t dense_tile_numbers(std::int64_t num_rows, std::int64_t num_columns) {
  return groups_of(num_rows) * pairs_of(num_columns) * kGroupRows;
}

}  // namespace optgptq

#if defined(__x86_64__)
#include <cstring>

namespace optgptq {
namespace {

constexpr std::int64_t kBlockTokens = 12;
// Numbers of an item's tokens, which stay in the second cache while all rows pass.
constexpr std::int64_t kNumbersPerItem = 1 << 17;
// Tokens that are packed at a time, more where they are short: bounds memory, and how often threads wait for each other.
constexpr std::int64_t kTokens = 960;
constexpr std::int64_t kNumbersAtATime = 1 << 20;
// Items for each thread, so that none waits long for the last one.
constexpr std::int64_t kItemsPerThread = 4;
// Pairs that are moved at a time, while their lines are in the first cache.
constexpr std::int64_t kPairsAtATime = 64;
// Multiplications below which a second thread costs more than it does.
constexpr std::int64_t kWorkPerThread = 1 << 18;
// Numbers that a thread packs at least.
constexpr std::int64_t kNumbersPerThread = 1 << 15;

inline std::int64_t smaller(std::int64_t one, std::int64_t other) { return one < other ? one : other; }

inline std::int64_t larger(std::int64_t one, std::int64_t other) { return one < other ? other : one; }

// Call `put(pair, row, numbers)` for all pairs of columns of `count` rows; an odd last number is put with a zero.
template <class Put>
inline void each_pair(
    const std::uint16_t* numbers, std::int64_t stride, std::int64_t count, std::int64_t num_columns, const Put& put) {
  const std::int64_t whole = num_columns / 2;
  for (std::int64_t begin = 0; begin < whole; begin += kPairsAtATime) {
    const std::int64_t end = smaller(begin + kPairsAtATime, whole);
    for (std::int64_t row = 0; row < count; ++row) {
      const std::uint16_t* from = numbers + row * stride;
      for (std::int64_t pair = begin; pair < end; ++pair) {
        std::uint32_t both;
        std::memcpy(&both, from + 2 * pair, sizeof both);
        put(pair, row, both);
      }
    }
  }
  if (num_columns % 2 != 0) {
    for (std::int64_t row = 0; row < count; ++row) put(whole, row, std::uint32_t{numbers[row * stride + 2 * whole]});
  }
}

// Tokens in blocks of nearly the same size, one behind the other.
struct Blocks {
  std::int64_t num_tokens, count;

  explicit Blocks(std::int64_t tokens) : num_tokens(tokens), count((tokens + kBlockTokens - 1) / kBlockTokens) {}

  std::int64_t begin(std::int64_t block) const { return block * num_tokens / count; }
};

OPTGPTQ_PAIRS_TARGET inline __m512 with_bias(__m512 sum, const float* bias, std::int64_t row, std::int64_t num_rows) {
  if (bias == nullptr || row >= num_rows) return sum;
  const std::int64_t left = smaller(num_rows - row, 16);
  return _mm512_add_ps(sum, _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), bias + row));
}

OPTGPTQ_PAIRS_TARGET inline __m512 number_at(const std::uint32_t* bits) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*bits)));
}

// The rows from `row` on, as far as there are 32, for N tokens from `token` on.
template <int N, bool kWidened>
OPTGPTQ_PAIRS_TARGET void multiply_block(
    const DenseCall& call, const std::uint32_t* inputs, const std::uint32_t* tiles, std::int64_t row,
    std::int64_t token) {
  __m512 sum[N][2];
  for (int t = 0; t < N; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
  const std::int64_t pairs = pairs_of(call.num_columns);
  for (std::int64_t pair = 0; pair < pairs; ++pair) {
    const __m512i one = _mm512_loadu_si512(tiles + kGroupRows * pair);
    const __m512i two = _mm512_loadu_si512(tiles + kGroupRows * pair + 16);
    if constexpr (kWidened) {
      const __m512 second_one = second_of(one), second_two = second_of(two);
      for (int t = 0; t < N; ++t) {
        const __m512 input = number_at(inputs + 2 * pair * N + t);
        sum[t][0] = _mm512_fmadd_ps(second_one, input, sum[t][0]);
        sum[t][1] = _mm512_fmadd_ps(second_two, input, sum[t][1]);
      }
      const __m512 first_one = first_of(one), first_two = first_of(two);
      for (int t = 0; t < N; ++t) {
        const __m512 input = number_at(inputs + (2 * pair + 1) * N + t);
        sum[t][0] = _mm512_fmadd_ps(first_one, input, sum[t][0]);
        sum[t][1] = _mm512_fmadd_ps(first_two, input, sum[t][1]);
      }
    } else {
      for (int t = 0; t < N; ++t) {
        const __m512i input = _mm512_set1_epi32(static_cast<int>(inputs[pair * N + t]));
        sum[t][0] = _mm512_dpbf16_ps(sum[t][0], (__m512bh)one, (__m512bh)input);
        sum[t][1] = _mm512_dpbf16_ps(sum[t][1], (__m512bh)two, (__m512bh)input);
      }
    }
  }
  const std::int64_t left = smaller(call.num_rows - row, kGroupRows);
  const auto stored = static_cast<__mmask32>(~0u >> (kGroupRows - left));
  for (int t = 0; t < N; ++t) {
    const __m512 low = with_bias(sum[t][0], call.bias, row, call.num_rows);
    const __m512 high = with_bias(sum[t][1], call.bias, row + 16, call.num_rows);
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    _mm512_mask_storeu_epi16(call.output + (token + t) * call.num_rows + row, stored, (__m512i)rounded);
  }
}

using MultiplyBlock = void (*)(
    const DenseCall&, const std::uint32_t*, const std::uint32_t*, std::int64_t, std::int64_t);

template <bool W>
constexpr MultiplyBlock kMultiplyBlock[kBlockTokens] = {
    multiply_block<1, W>, multiply_block<2, W>,  multiply_block<3, W>,  multiply_block<4, W>,
    multiply_block<5, W>, multiply_block<6, W>,  multiply_block<7, W>,  multiply_block<8, W>,
    multiply_block<9, W>, multiply_block<10, W>, multiply_block<11, W>, multiply_block<12, W>,
};

// Columns that are turned at a time: sixteen pairs, a register of a token.
constexpr std::int64_t kTurned = 32;
constexpr int kTurnedPairs = kTurned / 2;
static_assert(kBlockTokens <= kTurnedPairs);

// Turn sixteen rows of sixteen numbers into columns.
OPTGPTQ_PAIRS_TARGET inline void turn(__m512i (&rows)[kTurnedPairs]) {
  __m512i next[kTurnedPairs];
  for (int two = 0; two < 16; two += 2) {
    next[two] = _mm512_unpacklo_epi32(rows[two], rows[two + 1]);
    next[two + 1] = _mm512_unpackhi_epi32(rows[two], rows[two + 1]);
  }
  for (int four = 0; four < 16; four += 4) {
    for (int half = 0; half < 2; ++half) {
      rows[four + 2 * half] = _mm512_unpacklo_epi64(next[four + half], next[four + half + 2]);
      rows[four + 2 * half + 1] = _mm512_unpackhi_epi64(next[four + half], next[four + half + 2]);
    }
  }
  // Row 4 f + c holds columns c, c + 4, c + 8 and c + 12 of rows 4 f to 4 f + 3.
  for (int column = 0; column < 4; ++column) {
    next[column] = _mm512_shuffle_i32x4(rows[column], rows[4 + column], 0x88);
    next[4 + column] = _mm512_shuffle_i32x4(rows[column], rows[4 + column], 0xdd);
    next[8 + column] = _mm512_shuffle_i32x4(rows[8 + column], rows[12 + column], 0x88);
    next[12 + column] = _mm512_shuffle_i32x4(rows[8 + column], rows[12 + column], 0xdd);
  }
  for (int column = 0; column < 4; ++column) {
    rows[column] = _mm512_shuffle_i32x4(next[column], next[8 + column], 0x88);
    rows[8 + column] = _mm512_shuffle_i32x4(next[column], next[8 + column], 0xdd);
    rows[4 + column] = _mm512_shuffle_i32x4(next[4 + column], next[12 + column], 0x88);
    rows[12 + column] = _mm512_shuffle_i32x4(next[4 + column], next[12 + column], 0xdd);
  }
}

// The tokens of a block as pairs `[pairs, count]`, or widened as `[pairs, 2, count]` with the second numbers first.
OPTGPTQ_PAIRS_TARGET void pack_tokens(
    const DenseCall& call, std::int64_t begin, std::int64_t count, bool widened, std::uint32_t* packed) {
  const std::uint16_t* from = call.inputs + begin * call.input_stride;
  const auto tokens = static_cast<__mmask16>((1u << count) - 1);
  for (std::int64_t column = 0; column < call.num_columns; column += kTurned) {
    const std::int64_t left = smaller(call.num_columns - column, kTurned);
    const auto inside = static_cast<__mmask32>(~0u >> (kTurned - left));
    __m512i pairs[kTurnedPairs];
    for (int token = 0; token < kTurnedPairs; ++token) {
      pairs[token] = token < count ? _mm512_maskz_loadu_epi16(inside, from + token * call.input_stride + column)
                                   : _mm512_setzero_si512();
    }
    turn(pairs);
    const std::int64_t first = column / 2, some = pairs_of(left);
    for (int pair = 0; pair < kTurnedPairs; ++pair) {
      if (pair >= some) break;
      if (widened) {
        std::uint32_t* to = packed + 2 * (first + pair) * count;
        _mm512_mask_storeu_epi32(to, tokens, _mm512_castps_si512(second_of(pairs[pair])));
        _mm512_mask_storeu_epi32(to + count, tokens, _mm512_castps_si512(first_of(pairs[pair])));
      } else {
        _mm512_mask_storeu_epi32(packed + (first + pair) * count, tokens, pairs[pair]);
      }
    }
  }
}

}  // namespace

bool pack_dense(const DenseWeight& weight, std::uint32_t* tiles, std::int64_t num_threads) {
  if (!has_bfloat16_products()) return false;
  const std::int64_t size = pairs_of(weight.num_columns) * kGroupRows;
  const std::int64_t worth = weight.num_rows * weight.num_columns / kNumbersPerThread + 1;
  share_out(groups_of(weight.num_rows), smaller(worth, num_threads), [&](std::int64_t, std::int64_t group) {
    const std::int64_t row = group * kGroupRows, count = smaller(weight.num_rows - row, kGroupRows);
    std::uint32_t* to = tiles + group * size;
    if (count < kGroupRows) std::memset(to, 0, static_cast<std::size_t>(size) * sizeof *to);
    each_pair(
        weight.numbers + row * weight.stride, weight.stride, count, weight.num_columns,
        [&](std::int64_t pair, std::int64_t place, std::uint32_t both) { to[pair * kGroupRows + place] = both; });
  });
  return true;
}

namespace {

// As many tokens as `packed` has room for.
void multiply_tokens(const DenseCall& call, bool widened, std::uint32_t* packed, std::int64_t num_threads) {
  const Blocks blocks(call.num_tokens);
  const std::int64_t pairs = pairs_of(call.num_columns), groups = groups_of(call.num_rows);
  const std::int64_t numbers = call.num_tokens * call.num_columns;
  const std::int64_t size = widened ? 2 * pairs : pairs;  // of a token
  share_out(blocks.count, smaller(numbers / kNumbersPerThread + 1, num_threads), [&](std::int64_t, std::int64_t block) {
    const std::int64_t begin = blocks.begin(block), count = blocks.begin(block + 1) - begin;
    pack_tokens(call, begin, count, widened, packed + begin * size);
  });
  const std::int64_t workers = smaller(numbers * call.num_rows / kWorkPerThread + 1, num_threads);
  const std::int64_t fair = blocks.count * groups / (kItemsPerThread * workers);
  const std::int64_t most = larger(kNumbersPerItem / (kBlockTokens * size), 1);
  const std::int64_t per_item = smaller(larger(fair, 1), most);
  const MultiplyBlock* multiply = widened ? kMultiplyBlock<true> : kMultiplyBlock<false>;
  share_out((blocks.count + per_item - 1) / per_item * groups, workers, [&](std::int64_t, std::int64_t index) {
    const std::int64_t group = index % groups, first = index / groups * per_item;
    for (std::int64_t block = first; block < smaller(first + per_item, blocks.count); ++block) {
      const std::int64_t begin = blocks.begin(block), count = blocks.begin(block + 1) - begin;
      const std::uint32_t* tiles = call.tiles + group * pairs * kGroupRows;
      multiply[count - 1](call, packed + begin * size, tiles, group * kGroupRows, begin);
    }
  });
}

}  // namespace

bool multiply_dense(const DenseCall& call, PairWay way, std::int64_t num_threads) {
  if (!has_bfloat16_products()) return false;
  const bool widened = widens(way);
  const std::int64_t at_a_time = larger(kTokens, kNumbersAtATime / larger(call.num_columns, 1));
  const std::int64_t most = smaller(call.num_tokens, at_a_time);
  const std::int64_t size = pairs_of(call.num_columns) * (widened ? 2 : 1);
  const auto packed = aligned_memory(static_cast<std::size_t>(most * size) * sizeof(std::uint32_t));
  DenseCall part = call;
  for (std::int64_t begin = 0; begin < call.num_tokens; begin += at_a_time) {
    part.inputs = call.inputs + begin * call.input_stride;
    part.output = call.output + begin * call.num_rows;
    part.num_tokens = smaller(call.num_tokens - begin, at_a_time);
    multiply_tokens(part, widened, static_cast<std::uint32_t*>(packed.get()), num_threads);
  }
  return true;
}

}  // namespace optgptq

#else

namespace optgptq {

bool pack_dense(const DenseWeight&, std::uint32_t*, std::int64_t) { return false; }

bool multiply_dense(const DenseCall&, PairWay, std::int64_t) { return false; }

}  // namespace optgptq

#endif

namespace {

constexpr int kDone = 0, kNoMemory = 1, kUnsupported = 2;

}  // namespace

extern "C" __attribute__((visibility("default"))) std::int64_t optgptq_dense_tile_numbers(
    std::int64_t num_rows, std::int64_t num_columns) {
  return optgptq::dense_tile_numbers(num_rows, num_columns);
}

extern "C" __attribute__((visibility("default"))) int optgptq_pack_dense(
    const optgptq::DenseWeight* weight, std::uint32_t* tiles, std::int64_t num_threads) {
  return optgptq::pack_dense(*weight, tiles, num_threads) ? kDone : kUnsupported;
}

extern "C" __attribute__((visibility("default"))) int optgptq_multiply_dense(
    const optgptq::DenseCall* call, optgptq::PairWay way, std::int64_t num_threads) {
  try {
    return optgptq::multiply_dense(*call, way, num_threads) ? kDone : kUnsupported;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}
