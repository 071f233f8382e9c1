// Products with weights in codes, as Python calls them by ctypes. 0 means done.
#include "products.hpp"

#include <new>

#include "processor.hpp"
#include "products_call.hpp"

namespace optgptq {
namespace {

bool supported(int path) {
#if defined(__x86_64__)
  if (path == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_halves();
  if (path == kAvx512) {
    return supported(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (path == kAvx512Vnni) return supported(kAvx512) && __builtin_cpu_supports("avx512vnni");
#endif
  return path == kPortable;
}

}  // namespace

ProductPath product_path_of(int path) {
#if defined(__x86_64__)
  if (path == kAvx512Vnni) return avx512vnni::product_path();
  if (path == kAvx512) return avx512::product_path();
  if (path == kAvx2) return avx2::product_path();
#endif
  (void)path;
  return portable::product_path();
}

}  // namespace optgptq

extern "C" {

__attribute__((visibility("default"))) int optgptq_product_supported(int path) { return optgptq::supported(path); }

__attribute__((visibility("default"))) int optgptq_affine_product(const void* call, int path,
                                                                  std::int64_t num_threads) {
  const auto& affine = *static_cast<const optgptq::ProductCall<optgptq::AffineCodes>*>(call);
  try {
    const optgptq::ProductPath with = optgptq::product_path_of(path);
    if (affine.is_exact != 0) {
      optgptq::multiply_exact(affine, with, with.exact, num_threads);
    } else {
      optgptq::multiply_quantized(affine, with, with.multiply, num_threads);
    }
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
  return optgptq::kDone;
}

}  // extern "C"
