// Products with weights in codes for processors with AVX-512 and its sums of products of bytes; empty elsewhere.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "products.hpp"

// From here on, and only what is in an unnamed namespace: nothing compiled for this processor may be linked elsewhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#define OPTGPTQ_PATH avx512vnni
#define OPTGPTQ_VECTOR_BYTES 64
#define OPTGPTQ_VNNI
#include "products_path.hpp"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
