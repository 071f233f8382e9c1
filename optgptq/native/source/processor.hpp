// What processors are asked about beside their instruction sets.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace optgptq {

// AVX2 says nothing of conversions of half precision, though every processor with it has them.
inline bool converts_halves() {
#if defined(__x86_64__)
  unsigned int eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
#else
  return false;
#endif
}

}  // namespace optgptq
