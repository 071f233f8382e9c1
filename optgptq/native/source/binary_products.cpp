// Products with weights in binary coding, as Python calls them by ctypes. 0 means done.
#include "binary_products.hpp"

#include <new>

#include "products_call.hpp"

namespace optgptq {
namespace {

BinaryProductPath binary_path_of(int path) {
#if defined(__x86_64__)
  if (path == kAvx512Vnni) return avx512vnni::binary_product_path();
  if (path == kAvx512) return avx512::binary_product_path();
  if (path == kAvx2) return avx2::binary_product_path();
#endif
  (void)path;
  return portable::binary_product_path();
}

}  // namespace
}  // namespace optgptq

extern "C" __attribute__((visibility("default"))) int optgptq_binary_product(const void* call, int path,
                                                                             std::int64_t num_threads) {
  const auto& binary = *static_cast<const optgptq::ProductCall<optgptq::BinaryCodes>*>(call);
  try {
    const optgptq::ProductPath inputs = optgptq::product_path_of(path);
    const optgptq::BinaryProductPath with = optgptq::binary_path_of(path);
    if (binary.is_exact != 0) {
      optgptq::multiply_exact(binary, inputs, with.exact, num_threads);
    } else {
      optgptq::multiply_quantized(binary, inputs, with.multiply, num_threads);
    }
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
  return optgptq::kDone;
}
