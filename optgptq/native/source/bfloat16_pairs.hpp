// Sums of products of pairs of bfloat16 numbers, in two ways that give the same bits.
//
// Some processors do the instruction for pairs (AVX512_BF16) once in two cycles and multiplications of float32 twice in
// each: there numbers are widened to float32, which is exact, and multiplied twice as fast.
#pragma once

#include <cstdint>

namespace optgptq {

// The numbers are those of `optgptq/native/library.py`.
enum class PairWay : std::int64_t { kFaster = 0, kInstruction = 1, kWidened = 2 };

// Whether the processor has the instruction.
bool has_bfloat16_products();

// Whether numbers are to be widened; the faster way is found out once, in a tenth of a millisecond.
bool widens(PairWay way);

}  // namespace optgptq

#if defined(__x86_64__)
#include <immintrin.h>

#define OPTGPTQ_PAIRS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace optgptq {

// The second numbers of pairs, as float32: the instruction adds their products first.
OPTGPTQ_PAIRS_TARGET inline __m512 second_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

OPTGPTQ_PAIRS_TARGET inline __m512 first_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

}  // namespace optgptq

#endif
