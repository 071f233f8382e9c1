// What processors are asked about beside their instruction sets.
#pragma once

#include <cstdint>

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

// How far in front of its use a weight is asked for, in bytes; 0: not at all. Intel's processors keep few instructions that
// wait, so the loops over codes of a few bits reach too few lines ahead; AMD's read such a stream faster when left alone.
inline std::int64_t bytes_ahead() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") ? 4096 : 0;
#else
  return 0;
#endif
}

}  // namespace optgptq
