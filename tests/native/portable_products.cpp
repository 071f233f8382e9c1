// Products on the portable path, printed as a hash of their bits: the same on every kind of processor. The float mode is
// also compared with sums in double. Built and run by test_portability.py.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "products.hpp"

using namespace optgptq;

struct AffineCall {
  ProductRows rows;
  AffineCodes weight;
  ProductOutput output;
  std::int64_t num_tokens, is_exact;
};

extern "C" int optgptq_affine_product(const void* call, int path, std::int64_t num_threads);

static std::uint32_t state = 1;
static std::uint32_t draw() { return (state = state * 1664525u + 1013904223u) >> 8; }

int main() {
  const std::int64_t rows = 37, columns = 256, groups = 4, blocks = 8;
  std::uint64_t hash = 14695981039346656037ull;
  for (std::int64_t bits : {1, 2, 3, 4, 8}) {
    for (std::int64_t tokens : {1, 3, 9, 33}) {
      alignas(64) static std::uint8_t codes[3 * 8 * 8 * 64];
      alignas(64) static float scales[3 * 4 * 16];
      for (auto& code : codes) code = static_cast<std::uint8_t>(draw());
      for (auto& scale : scales) scale = static_cast<float>(draw() % 1000) / 4096.0f;
      std::vector<float> x(static_cast<std::size_t>(tokens * columns));
      for (auto& number : x) number = static_cast<float>(static_cast<std::int32_t>(draw() % 65536) - 32768) / 1024.0f;
      for (std::int64_t is_exact : {0, 1}) {
        std::vector<float> found(static_cast<std::size_t>(tokens * rows)), again(found);
        AffineCall call{{x.data(), nullptr, kFloat, columns, columns},
                        {codes, scales, nullptr, kFloat, kCommonZero, 1 << (bits - 1), bits, rows, blocks, groups},
                        {found.data(), nullptr, kFloat, rows}, tokens, is_exact};
        if (optgptq_affine_product(&call, 0, 1) != 0) return 1;
        call.output.numbers = again.data();
        if (optgptq_affine_product(&call, 0, 3) != 0) return 1;
        if (std::memcmp(found.data(), again.data(), found.size() * sizeof(float)) != 0) return 2;
        for (std::int64_t index = 0; index < tokens * rows && bits == 8; ++index) {
          const std::int64_t token = index / rows, row = index % rows;
          double sum = 0, size = 0;
          for (std::int64_t column = 0; column < columns; ++column) {
            const std::int64_t block = column / 32, quad = column % 32 / 4, tile = row / 16;
            const int code = codes[((tile * blocks + block) * 8 + quad) * 64 + row % 16 * 4 + column % 4] - 128;
            const double scale = scales[(tile * groups + block / 2) * 16 + row % 16];
            const double product = code * scale * x[static_cast<std::size_t>(token * columns + column)];
            sum += product, size += std::fabs(product);
          }
          const double error = std::fabs(found[static_cast<std::size_t>(index)] - sum);
          if (!(error <= size * (is_exact != 0 ? 1e-6 : 1e-2))) return 3;
        }
        for (float number : found) {
          std::uint32_t word;
          std::memcpy(&word, &number, sizeof word);
          hash = (hash ^ word) * 1099511628211ull;
        }
      }
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(hash));
  return 0;
}
