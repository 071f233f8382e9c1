// Products with weights in binary coding for processors with AVX2; empty elsewhere.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "binary_products.hpp"

// From here on, and only what is in an unnamed namespace: nothing compiled for this processor may be linked elsewhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define OPTGPTQ_PATH avx2
#define OPTGPTQ_VECTOR_BYTES 32
#include "binary_products_path.hpp"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
