// Codes as vectors of floats: rows of bytes turned so that a byte of neighbouring keys is one vector, and bytes taken
// apart. Included once by each instruction set.
#pragma once

#include "cache_attention.hpp"
#include "paged_attention_products.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// Keys whose rows follow each other in any page, and their number in a tile.
constexpr std::int64_t kBlockKeys = 16;
constexpr std::int64_t kBlocks = kKeys / kBlockKeys;
// Bytes of a row that are turned together; what is read beyond a row is still in its page.
constexpr std::int64_t kTurned = 16;

inline std::int64_t turned_bytes(std::int64_t row_bytes) { return (row_bytes + kTurned - 1) / kTurned * kTurned; }

// As many bytes as a vector has lanes; compilers take them one by one where they are not told how.
OPTGPTQ_INLINE IntVector load_bytes(const std::uint8_t* from) {
#if OPTGPTQ_VECTOR_BYTES == 64
  return (IntVector)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif OPTGPTQ_VECTOR_BYTES == 32
  return (IntVector)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return IntVector{from[0], from[1], from[2], from[3]};
#endif
}

// A byte holds `planes` codes or parts of codes; part `p` of the channels lies `p` codes up.
constexpr std::int64_t planes_of(std::int64_t bits) { return bits == 3 ? 8 : 8 / bits; }

// Where the third bits of codes of 3 bits begin in a row.
inline std::int64_t third_bits(std::int64_t head_dim) { return (head_dim / 4 + 3) / 4 * 4; }

// Codes of the channels that are `byte`, byte + 1 .. of part `plane`, with `stride` bytes from one channel's to the
// next one's in `rows`; vectors run along whatever lies side by side there.
template <int kBits>
OPTGPTQ_INLINE IntVector codes_at(
    const std::uint8_t* rows, std::int64_t head_dim, std::int64_t byte, int plane, std::int64_t stride) {
  if constexpr (kBits == 3) {
    const std::int64_t eighth = head_dim / 8;
    const IntVector lower = load_bytes(rows + ((plane & 1) * eighth + byte) * stride) >> (plane / 2 * 2);
    const IntVector upper = load_bytes(rows + (third_bits(head_dim) + byte) * stride) >> plane;
    return (lower & 3) | ((upper & 1) << 2);
  }
  const IntVector bytes = load_bytes(rows + byte * stride);
  if constexpr (kBits == 8) return bytes;
  if constexpr (kBits == 4) return plane == 0 ? bytes & 15 : bytes >> 4;
  return (bytes >> (2 * plane)) & 3;
}

OPTGPTQ_INLINE FloatVector as_floats(IntVector codes) { return __builtin_convertvector(codes, FloatVector); }

#if OPTGPTQ_VECTOR_BYTES == 64
typedef __m512i Wide;
constexpr std::int64_t kTurnedBlocks = 4;
OPTGPTQ_INLINE Wide low_bytes(Wide a, Wide b) { return _mm512_unpacklo_epi8(a, b); }
OPTGPTQ_INLINE Wide high_bytes(Wide a, Wide b) { return _mm512_unpackhi_epi8(a, b); }
OPTGPTQ_INLINE void save(std::uint8_t* to, Wide a) { _mm512_storeu_si512(to, a); }
OPTGPTQ_INLINE Wide lines(const std::uint8_t* const* rows) {
  const auto line = [&](int block) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[block])); };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(line(0)), line(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(line(2)), line(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#elif OPTGPTQ_VECTOR_BYTES == 32
typedef __m256i Wide;
constexpr std::int64_t kTurnedBlocks = 2;
OPTGPTQ_INLINE Wide low_bytes(Wide a, Wide b) { return _mm256_unpacklo_epi8(a, b); }
OPTGPTQ_INLINE Wide high_bytes(Wide a, Wide b) { return _mm256_unpackhi_epi8(a, b); }
OPTGPTQ_INLINE void save(std::uint8_t* to, Wide a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a); }
OPTGPTQ_INLINE Wide lines(const std::uint8_t* const* rows) {
  const auto line = [&](int block) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[block])); };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(line(0)), line(1), 1);
}
#endif

#if OPTGPTQ_VECTOR_BYTES > 16
// Sixteen bytes of each key: four rounds of pairing registers turn the 16 x 16 bytes of each block.
OPTGPTQ_INLINE void turn_lines(const std::uint8_t** rows, std::int64_t row_bytes, std::uint8_t* to) {
  Wide line[16], next[16];
  for (int key = 0; key < 16; ++key) {
    line[key] = lines(rows);
    for (int block = 0; block < kTurnedBlocks; ++block) rows[block] += row_bytes;
  }
  for (int round = 0; round < 4; ++round) {
    for (int pair = 0; pair < 8; ++pair) {
      next[2 * pair] = low_bytes(line[pair], line[pair + 8]);
      next[2 * pair + 1] = high_bytes(line[pair], line[pair + 8]);
    }
    for (int key = 0; key < 16; ++key) line[key] = next[key];
  }
  for (int byte = 0; byte < 16; ++byte) save(to + byte * kKeys, line[byte]);
}

// Bytes `[row, 64 keys]` of the rows of a tile's blocks; `to` has room for `turned_bytes` rows.
void turn_rows(const std::uint8_t* const* rows, std::int64_t row_bytes, std::uint8_t* to) {
  for (std::int64_t first = 0; first < row_bytes; first += kTurned) {
    for (std::int64_t block = 0; block < kBlocks; block += kTurnedBlocks) {
      const std::uint8_t* place[kTurnedBlocks];
      for (int index = 0; index < kTurnedBlocks; ++index) place[index] = rows[block + index] + first;
      turn_lines(place, row_bytes, to + first * kKeys + block * kBlockKeys);
    }
  }
}
#else
void turn_rows(const std::uint8_t* const* rows, std::int64_t row_bytes, std::uint8_t* to) {
  for (std::int64_t key = 0; key < kKeys; ++key) {
    const std::uint8_t* row = rows[key / kBlockKeys] + key % kBlockKeys * row_bytes;
    for (std::int64_t byte = 0; byte < row_bytes; ++byte) to[byte * kKeys + key] = row[byte];
  }
}
#endif

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
