// What lies between products, for processors with AVX2 with FMA and conversions of half precision; empty elsewhere.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "leaves.hpp"

// From here on, and only what is in an unnamed namespace: nothing compiled for this processor may be linked elsewhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define OPTGPTQ_PATH avx2
#define OPTGPTQ_VECTOR_BYTES 32
#include "leaves_path.hpp"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
