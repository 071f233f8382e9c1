// Attention over keys and values in pages of codes. The definition is `optgptq/kernels/quantized_attention.py`; where
// the bytes of a page lie, `optgptq/kv_cache/page_layout.py`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "paged_attention.hpp"

namespace optgptq {

constexpr std::int64_t kExactBits = 16;

// Keys, or values, of one layer; the records of this file are mirrored by `optgptq/native/quantized_attention.py`.
struct CacheSide {
  const float* ranges;    // [C, 2]; this and the two below are read where codes are made
  const float* metric;    // [K, D, D], or null
  const float* feedback;  // [K, D, D], or null
  std::int64_t num_ranges, bits, group_size, along_tokens;
  std::int64_t row_bytes, codes, parameters;  // in a head of a page: bytes of a row, where the two planes begin
};

// Pages of codes of one layer, and the exact pages beside them.
struct CachePages {
  std::uint8_t* bytes;
  std::int64_t page_bytes, head_bytes;
  NumberType type;  // of exact sides
  CacheSide keys, values;
  Pages exact;  // its shape holds for both; null pointers where there are none
  const std::int32_t* exact_table;
  std::int64_t exact_stride;
};

// The step's own keys and values, [T, K, D]; the numbers of a head are side by side.
struct NewTokens {
  const float* key;
  const float* value;
  std::int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
};

struct CacheCall {
  CachePages pages;
  PagedSequences sequences;
  ScoreRule rule;
  NewTokens tokens;
  const float* query;               // [T, N, D]; the numbers of a head are side by side
  float* output;                    // [T, N, D], nothing between
  const std::int32_t* first_exact;  // [T]
  std::int64_t token_stride, head_stride, num_heads, num_sinks;
};

struct CacheStoreCall {
  CachePages pages;
  PagedSequences sequences;
  NewTokens tokens;
  const std::int64_t* slot;  // [T]
  std::int64_t num_tokens;
};

// New tokens `first .. first + num_tokens - 1` of the step, or a sequence where groups run along tokens, and one head.
struct CacheStoreItem {
  std::int64_t kv_head, first, num_tokens, sequence;
};

// One instruction set.
struct CachePath {
  std::size_t (*attend_bytes)(const CacheCall& call, std::int64_t num_rows);
  // `scratch` begins at a multiple of 64 bytes, here and below.
  void (*attend)(const CacheCall& call, const PagedItem& item, void* scratch);
  std::size_t (*store_bytes)(const CacheStoreCall& call);
  // Codes of vectors; sides whose groups run along tokens are left out.
  void (*store)(const CacheStoreCall& call, const CacheStoreItem& item, void* scratch);
  // Codes of all groups along tokens whose last token is new.
  void (*store_groups)(const CacheStoreCall& call, const CacheStoreItem& item, void* scratch);
};

namespace portable {
CachePath cache_path();
}
namespace avx2 {
CachePath cache_path();
}
namespace avx512 {
CachePath cache_path();
}

}  // namespace optgptq
