// X^T X of bfloat16 inputs by the instruction that multiplies pairs and adds in float32 (AVX512_BF16).
//
// Tokens are packed by pairs: number `j` of a packed row holds column `j` of two tokens. The same packed panels serve
// as both factors. A product of two bfloat16 numbers is exact in float32, so only sums are rounded, as elsewhere.
#include "moment.hpp"

#include "threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#define OPTGPTQ_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace optgptq {
namespace {

// Columns of a panel: a product of two panels is done by tiles of kRows x kPanel, 24 registers of sums.
constexpr std::int64_t kPanel = 48;
constexpr std::int64_t kRows = 8;
constexpr int kVectors = kPanel / 16;
// Pairs of tokens that are added up before the sum in memory sees them. With 64, sums are as good as those of torch;
// with 256, a tenth faster, their errors were four times as large.
constexpr std::int64_t kPairs = 64;
// Tokens that are packed at a time: bounds memory.
constexpr std::int64_t kTokens = 4096;
// Multiplications below which a second thread costs more than it does.
constexpr double kWorkPerThread = 1e8;

struct Job {
  const std::uint16_t* inputs;
  std::int64_t inputs_stride, num_tokens, num_columns;
  float* sum;
  std::int64_t sum_stride;
  std::uint32_t* packed;  // [panels, pairs, kPanel]
  std::int64_t num_pairs;
};

OPTGPTQ_TARGET void pack_panel(const Job& job, std::int64_t panel) {
  std::uint32_t* to = job.packed + panel * job.num_pairs * kPanel;
  for (std::int64_t pair = 0; pair < job.num_pairs; ++pair) {
    const std::uint16_t* first = job.inputs + 2 * pair * job.inputs_stride;
    const bool both = 2 * pair + 1 < job.num_tokens;
    for (int vector = 0; vector < kVectors; ++vector) {
      const std::int64_t column = panel * kPanel + 16 * vector, rest = job.num_columns - column;
      const __mmask16 inside = rest >= 16 ? 0xffff : rest <= 0 ? 0 : static_cast<__mmask16>((1u << rest) - 1);
      __m512i pairs = _mm512_setzero_si512();
      if (inside != 0) {
        pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, first + column));
        if (both) {
          const __m256i second = _mm256_maskz_loadu_epi16(inside, first + job.inputs_stride + column);
          pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
        }
      }
      _mm512_store_si512(to + pair * kPanel + 16 * vector, pairs);
    }
  }
}

// Add `num_pairs` pairs of tokens to one tile of the sum; `rows` and `columns` point into packed panels.
OPTGPTQ_TARGET void add_tile(
    const std::uint32_t* rows, const std::uint32_t* columns, std::int64_t num_pairs, float* sum,
    std::int64_t sum_stride, std::int64_t num_rows, std::int64_t num_columns) {
  __m512 total[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int vector = 0; vector < kVectors; ++vector) total[row][vector] = _mm512_setzero_ps();
  }
  for (std::int64_t pair = 0; pair < num_pairs; ++pair) {
    __m512bh right[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) {
      right[vector] = (__m512bh)_mm512_load_si512(columns + pair * kPanel + 16 * vector);
    }
    for (int row = 0; row < kRows; ++row) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(rows[pair * kPanel + row]));
      for (int vector = 0; vector < kVectors; ++vector) {
        total[row][vector] = _mm512_dpbf16_ps(total[row][vector], left, right[vector]);
      }
    }
  }
  for (int row = 0; row < kRows && row < num_rows; ++row) {
    for (int vector = 0; vector < kVectors; ++vector) {
      const std::int64_t rest = num_columns - 16 * vector;
      const __mmask16 inside = rest >= 16 ? 0xffff : rest <= 0 ? 0 : static_cast<__mmask16>((1u << rest) - 1);
      float* place = sum + row * sum_stride + 16 * vector;
      const __m512 before = _mm512_maskz_loadu_ps(inside, place);
      _mm512_mask_storeu_ps(place, inside, _mm512_add_ps(before, total[row][vector]));
    }
  }
}

void add_block(const Job& job, std::int64_t row_panel, std::int64_t column_panel) {
  const std::int64_t num_rows = job.num_columns - row_panel * kPanel;
  const std::int64_t num_columns = job.num_columns - column_panel * kPanel;
  float* sum = job.sum + row_panel * kPanel * job.sum_stride + column_panel * kPanel;
  for (std::int64_t begin = 0; begin < job.num_pairs; begin += kPairs) {
    const std::int64_t rest = job.num_pairs - begin, pairs = rest < kPairs ? rest : kPairs;
    const std::uint32_t* rows = job.packed + (row_panel * job.num_pairs + begin) * kPanel;
    const std::uint32_t* columns = job.packed + (column_panel * job.num_pairs + begin) * kPanel;
    for (std::int64_t row = 0; row < kPanel && row < num_rows; row += kRows) {
      add_tile(
          rows + row, columns, pairs, sum + row * job.sum_stride, job.sum_stride, num_rows - row, num_columns);
    }
  }
}

void add_tokens(Job job, std::int64_t num_threads) {
  const std::int64_t panels = (job.num_columns + kPanel - 1) / kPanel;
  share_out(panels, num_threads, [&](std::int64_t, std::int64_t panel) { pack_panel(job, panel); });
  // A block row is one item: its panel of rows stays in the cache. The longest come first.
  share_out(panels, num_threads, [&](std::int64_t, std::int64_t row_panel) {
    for (std::int64_t column_panel = row_panel; column_panel < panels; ++column_panel) {
      add_block(job, row_panel, column_panel);
    }
  });
}

}  // namespace

bool has_bfloat16_products() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

bool add_bfloat16_moment(
    const std::uint16_t* inputs, std::int64_t inputs_stride, std::int64_t num_tokens, std::int64_t num_columns,
    float* sum, std::int64_t sum_stride, std::int64_t num_threads) {
  if (!has_bfloat16_products()) return false;
  const double products = 0.5 * static_cast<double>(num_tokens) * static_cast<double>(num_columns * num_columns);
  const auto worth = static_cast<std::int64_t>(products / kWorkPerThread) + 1;
  const std::int64_t panels = (num_columns + kPanel - 1) / kPanel;
  const std::int64_t most_pairs = (num_tokens < kTokens ? num_tokens + 1 : kTokens) / 2;
  const auto packed = aligned_memory(static_cast<std::size_t>(panels * most_pairs * kPanel) * sizeof(std::uint32_t));
  for (std::int64_t begin = 0; begin < num_tokens; begin += kTokens) {
    const std::int64_t rest = num_tokens - begin, tokens = rest < kTokens ? rest : kTokens;
    add_tokens(
        {inputs + begin * inputs_stride, inputs_stride, tokens, num_columns, sum, sum_stride,
         static_cast<std::uint32_t*>(packed.get()), (tokens + 1) / 2},
        worth < num_threads ? worth : num_threads);
  }
  return true;
}

}  // namespace optgptq

#else

namespace optgptq {

bool has_bfloat16_products() { return false; }

bool add_bfloat16_moment(
    const std::uint16_t*, std::int64_t, std::int64_t, std::int64_t, float*, std::int64_t, std::int64_t) {
  return false;
}

}  // namespace optgptq

#endif
