// X^T X and X^T Y of bfloat16 numbers with sums in float32 (AVX512_BF16).
//
// Tokens are packed by pairs: number `j` of a packed row holds column `j` of two tokens; or widened, row by row, the
// second token of a pair first. Packed panels of `X` serve as both factors of X^T X. A product of two bfloat16 numbers is
// exact in float32, so only sums are rounded, as elsewhere.
#include "moment.hpp"

#include "threads.hpp"

#if defined(__x86_64__)

namespace optgptq {
namespace {

// Columns of a panel: a product of two panels is done by tiles of kRows x kPanel, 24 registers of sums.
constexpr std::int64_t kPanel = 48;
constexpr std::int64_t kRows = 8;
constexpr int kVectors = kPanel / 16;
// Pairs of tokens that are added up before the sum in memory sees them. With 64, sums are as good as those of torch;
// with 256, a tenth faster, their errors were four times as large.
constexpr std::int64_t kPairs = 64;
// Tokens that are packed at a time, half as many if they are widened: bounds memory. A multiple of 2 kPairs, so sums are
// the same.
constexpr std::int64_t kTokens = 4096;
// Multiplications below which a second thread costs more than it does.
constexpr double kWorkPerThread = 1e7;

// One factor, and its columns packed by panels.
struct Factor {
  const std::uint16_t* numbers;  // [T, columns]
  std::int64_t stride, num_columns;
  std::uint32_t* packed;  // [panels, pairs, kPanel], or float [panels, pairs, 2, kPanel]
};

struct Job {
  Factor left, right;
  std::int64_t num_tokens, num_pairs;
  bool widened;
  bool symmetric;  // both factors are one: only blocks on and above the diagonal are wanted
  float* sum;
  std::int64_t sum_stride;

  // Packed rows of a pair of tokens.
  std::int64_t rows_of_pair() const { return widened ? 2 : 1; }
};

std::int64_t num_panels(std::int64_t num_columns) { return (num_columns + kPanel - 1) / kPanel; }

OPTGPTQ_PAIRS_TARGET void pack_panel(const Job& job, const Factor& factor, std::int64_t panel) {
  std::uint32_t* to = factor.packed + panel * job.num_pairs * job.rows_of_pair() * kPanel;
  for (std::int64_t pair = 0; pair < job.num_pairs; ++pair) {
    const std::uint16_t* first = factor.numbers + 2 * pair * factor.stride;
    const bool both = 2 * pair + 1 < job.num_tokens;
    for (int vector = 0; vector < kVectors; ++vector) {
      const std::int64_t column = panel * kPanel + 16 * vector, rest = factor.num_columns - column;
      const __mmask16 inside = rest >= 16 ? 0xffff : rest <= 0 ? 0 : static_cast<__mmask16>((1u << rest) - 1);
      __m512i pairs = _mm512_setzero_si512();
      if (inside != 0) {
        pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, first + column));
        if (both) {
          const __m256i second = _mm256_maskz_loadu_epi16(inside, first + factor.stride + column);
          pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
        }
      }
      if (job.widened) {
        _mm512_store_ps(to + 2 * pair * kPanel + 16 * vector, second_of(pairs));
        _mm512_store_ps(to + (2 * pair + 1) * kPanel + 16 * vector, first_of(pairs));
      } else {
        _mm512_store_si512(to + pair * kPanel + 16 * vector, pairs);
      }
    }
  }
}

template <bool kWidened>
OPTGPTQ_PAIRS_TARGET inline __m512 add_products(__m512 sum, __m512i left, __m512i right) {
  if constexpr (kWidened) return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
  return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}

// Add packed rows of tokens to one tile of the sum; `rows` and `columns` point into packed panels.
// Add packed rows of tokens to one tile of the sum, its vectors from kFrom to kTo; `rows` and `columns` point into
// packed panels.
template <bool kWidened, int kFrom, int kTo>
OPTGPTQ_PAIRS_TARGET void add_tile(
    const std::uint32_t* rows, const std::uint32_t* columns, std::int64_t num_packed, float* sum,
    std::int64_t sum_stride, std::int64_t num_rows, std::int64_t num_columns) {
  __m512 total[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int vector = kFrom; vector < kTo; ++vector) total[row][vector] = _mm512_setzero_ps();
  }
  for (std::int64_t token = 0; token < num_packed; ++token) {
    __m512i right[kVectors];
    for (int vector = kFrom; vector < kTo; ++vector) {
      right[vector] = _mm512_load_si512(columns + token * kPanel + 16 * vector);
    }
    for (int row = 0; row < kRows; ++row) {
      const __m512i left = _mm512_set1_epi32(static_cast<int>(rows[token * kPanel + row]));
      for (int vector = kFrom; vector < kTo; ++vector) {
        total[row][vector] = add_products<kWidened>(total[row][vector], left, right[vector]);
      }
    }
  }
  for (int row = 0; row < kRows && row < num_rows; ++row) {
    for (int vector = kFrom; vector < kTo; ++vector) {
      const std::int64_t rest = num_columns - 16 * vector;
      const __mmask16 inside = rest >= 16 ? 0xffff : static_cast<__mmask16>((1u << rest) - 1);
      float* place = sum + row * sum_stride + 16 * vector;
      const __m512 before = _mm512_maskz_loadu_ps(inside, place);
      _mm512_mask_storeu_ps(place, inside, _mm512_add_ps(before, total[row][vector]));
    }
  }
}

using AddTile = void (*)(
    const std::uint32_t*, const std::uint32_t*, std::int64_t, float*, std::int64_t, std::int64_t, std::int64_t);

// By the first vector and the one behind the last.
template <bool W>
constexpr AddTile kAddTile[kVectors][kVectors] = {
    {add_tile<W, 0, 1>, add_tile<W, 0, 2>, add_tile<W, 0, 3>},
    {nullptr, add_tile<W, 1, 2>, add_tile<W, 1, 3>},
    {nullptr, nullptr, add_tile<W, 2, 3>},
};
static_assert(kVectors == 3);

void add_block(const Job& job, std::int64_t row_panel, std::int64_t column_panel) {
  const std::int64_t num_rows = job.left.num_columns - row_panel * kPanel;
  const std::int64_t num_columns = job.right.num_columns - column_panel * kPanel;
  const std::int64_t last = num_columns >= kPanel ? kVectors : (num_columns + 15) / 16;
  const bool diagonal = job.symmetric && row_panel == column_panel;
  const auto& add = job.widened ? kAddTile<true> : kAddTile<false>;
  float* sum = job.sum + row_panel * kPanel * job.sum_stride + column_panel * kPanel;
  for (std::int64_t begin = 0; begin < job.num_pairs; begin += kPairs) {
    const std::int64_t rest = job.num_pairs - begin, pairs = rest < kPairs ? rest : kPairs;
    const std::int64_t each = job.rows_of_pair();
    const std::uint32_t* rows = job.left.packed + (row_panel * job.num_pairs + begin) * each * kPanel;
    const std::uint32_t* columns = job.right.packed + (column_panel * job.num_pairs + begin) * each * kPanel;
    for (std::int64_t row = 0; row < kPanel && row < num_rows; row += kRows) {
      const std::int64_t first = diagonal ? row / 16 : 0;
      add[first][last - 1](
          rows + row, columns, pairs * each, sum + row * job.sum_stride, job.sum_stride, num_rows - row, num_columns);
    }
  }
}

void add_tokens(const Job& job, std::int64_t num_threads) {
  const std::int64_t left = num_panels(job.left.num_columns), right = num_panels(job.right.num_columns);
  share_out(left, num_threads, [&](std::int64_t, std::int64_t panel) { pack_panel(job, job.left, panel); });
  if (!job.symmetric) {
    share_out(right, num_threads, [&](std::int64_t, std::int64_t panel) { pack_panel(job, job.right, panel); });
  }
  // Blocks of a row follow each other: their panel of rows stays in the cache.
  const std::int64_t num_blocks = job.symmetric ? left * (left + 1) / 2 : left * right;
  share_out(num_blocks, num_threads, [&](std::int64_t, std::int64_t block) {
    std::int64_t row_panel = 0, in_row = right;
    for (; block >= in_row; ++row_panel, in_row -= job.symmetric ? 1 : 0) block -= in_row;
    add_block(job, row_panel, block + (job.symmetric ? row_panel : 0));
  });
}

}  // namespace

bool add_bfloat16_products(
    const Bfloat16Matrix& left, const Bfloat16Matrix& right, std::int64_t num_tokens, float* sum,
    std::int64_t sum_stride, PairWay way, std::int64_t num_threads) {
  if (!has_bfloat16_products()) return false;
  const bool symmetric = right.numbers == nullptr;
  const std::int64_t num_right = symmetric ? left.num_columns : right.num_columns;
  const double products = (symmetric ? 0.5 : 1.0) * static_cast<double>(num_tokens) *
                          static_cast<double>(left.num_columns) * static_cast<double>(num_right);
  const auto worth = static_cast<std::int64_t>(products / kWorkPerThread) + 1;
  const bool widened = widens(way);
  const std::int64_t at_a_time = widened ? kTokens / 2 : kTokens;
  const std::int64_t most_pairs = (num_tokens < at_a_time ? num_tokens + 1 : at_a_time) / 2;
  const std::int64_t most_rows = widened ? 2 * most_pairs : most_pairs;
  const std::int64_t left_size = num_panels(left.num_columns) * most_rows * kPanel;
  const std::int64_t right_size = symmetric ? 0 : num_panels(num_right) * most_rows * kPanel;
  const auto packed = aligned_memory(static_cast<std::size_t>(left_size + right_size) * sizeof(std::uint32_t));
  auto* packed_left = static_cast<std::uint32_t*>(packed.get());
  for (std::int64_t begin = 0; begin < num_tokens; begin += at_a_time) {
    const std::int64_t rest = num_tokens - begin, tokens = rest < at_a_time ? rest : at_a_time;
    const Factor first{left.numbers + begin * left.stride, left.stride, left.num_columns, packed_left};
    const Factor second = symmetric ? first
                                    : Factor{right.numbers + begin * right.stride, right.stride, num_right,
                                             packed_left + left_size};
    add_tokens(
        {first, second, tokens, (tokens + 1) / 2, widened, symmetric, sum, sum_stride},
        worth < num_threads ? worth : num_threads);
  }
  return true;
}

}  // namespace optgptq

#else

namespace optgptq {

bool add_bfloat16_products(
    const Bfloat16Matrix&, const Bfloat16Matrix&, std::int64_t, float*, std::int64_t, PairWay, std::int64_t) {
  return false;
}

}  // namespace optgptq

#endif
