#include "bfloat16_pairs.hpp"

#if defined(__x86_64__)

namespace optgptq {
namespace {

constexpr int kSums = 12;
constexpr int kRounds = 20;
constexpr int kTimes = 50;

// Sums are hidden from the compiler, which would see that all are the same.
#define OPTGPTQ_KEEP(sum) asm volatile("" : "+v"(sum))

OPTGPTQ_PAIRS_TARGET unsigned long long ticks_of_instruction() {
  __m512 sum[kSums];
  for (__m512& one : sum) one = _mm512_setzero_ps();
  const __m512bh pair = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  const unsigned long long begin = __builtin_ia32_rdtsc();
  for (int time = 0; time < kTimes; ++time) {
    for (__m512& one : sum) {
      one = _mm512_dpbf16_ps(one, pair, pair);
      OPTGPTQ_KEEP(one);
    }
  }
  return __builtin_ia32_rdtsc() - begin;
}

OPTGPTQ_PAIRS_TARGET unsigned long long ticks_of_widened() {
  __m512 sum[kSums];
  for (__m512& one : sum) one = _mm512_setzero_ps();
  const __m512 number = _mm512_set1_ps(1.0f);
  const unsigned long long begin = __builtin_ia32_rdtsc();
  for (int time = 0; time < 2 * kTimes; ++time) {
    for (__m512& one : sum) {
      one = _mm512_fmadd_ps(number, number, one);
      OPTGPTQ_KEEP(one);
    }
  }
  return __builtin_ia32_rdtsc() - begin;
}

bool widened_is_faster() {
  unsigned long long instruction = ~0ull, widened = ~0ull;
  for (int round = 0; round < kRounds; ++round) {
    const unsigned long long one = ticks_of_instruction(), other = ticks_of_widened();
    if (one < instruction) instruction = one;
    if (other < widened) widened = other;
  }
  // Widening costs something besides.
  return 10 * widened < 8 * instruction;
}

}  // namespace

bool has_bfloat16_products() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}

bool widens(PairWay way) {
  if (way != PairWay::kFaster) return way == PairWay::kWidened;
  static const bool faster = has_bfloat16_products() && widened_is_faster();
  return faster;
}

}  // namespace optgptq

#else

namespace optgptq {

bool has_bfloat16_products() { return false; }

bool widens(PairWay) { return false; }

}  // namespace optgptq

#endif

extern "C" __attribute__((visibility("default"))) int optgptq_widens_bfloat16() {
  return optgptq::widens(optgptq::PairWay::kFaster) ? 1 : 0;
}
