// Attention over keys and values in pages. The definition is `optgptq/kernels/paged_attention.py`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace optgptq {

// How the numbers of pages are stored.
enum class NumberType : std::int64_t { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

// What both calls are told of the pages of one layer; the layout is mirrored by `optgptq/native/paged_attention.py`.
struct Pages {
  void* keys;    // [Z, K, D, Y]
  void* values;  // [Z, K, Y, D]
  std::int64_t num_kv_heads, head_dim, page_size;
  NumberType type;
};

// The sequences of a step.
struct PagedSequences {
  const std::int32_t* query_start;  // [R + 1]
  const std::int32_t* context;      // [R]
  const std::int32_t* page_table;   // [R, P]
  std::int64_t table_stride, num_sequences, max_query;
};

// How scores are made.
struct ScoreRule {
  const float* slopes;  // [N], or null
  const float* sinks;   // [N], or null
  std::int64_t window;  // 0: none
  std::int64_t round_alibi;
  double scale, softcap, alibi_scale;  // no softcap: 0
};

struct PagedCall {
  Pages pages;
  PagedSequences sequences;
  ScoreRule rule;
  const float* query;  // [T, N, D]; the numbers of a head are side by side
  float* output;       // [T, N, D], nothing between
  std::int64_t token_stride, head_stride, num_heads;
};

struct StoreCall {
  Pages pages;
  const float* key;          // [T, K, D]; the numbers of a head are side by side
  const float* value;        // [T, K, D]
  const std::int64_t* slot;  // [T]
  std::int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride, num_tokens;
};

// New tokens `first .. first + num_tokens - 1` of a sequence, and the query heads of one key/value head.
struct PagedItem {
  std::int64_t sequence, kv_head, first, num_tokens;
};

// One instruction set.
struct PagedPath {
  std::size_t (*scratch_bytes)(const PagedCall& call, std::int64_t num_rows);
  // `scratch` begins at a multiple of 64 bytes.
  void (*attend)(const PagedCall& call, const PagedItem& item, void* scratch);
  void (*store)(const StoreCall& call, std::int64_t kv_head);
  // exp(x) for x <= 0, and tanh(x).
  void (*exponential)(const float* from, float* to, std::int64_t size);
  void (*tangent)(const float* from, float* to, std::int64_t size);
};

// Shared out among threads; `path` is that of `optgptq_supported`.
void attend_pages(const PagedCall& call, int path, std::int64_t num_threads);
void store_pages(const StoreCall& call, int path, std::int64_t num_threads);

namespace portable {
PagedPath paged_path();
}
namespace avx2 {
PagedPath paged_path();
}
namespace avx512 {
PagedPath paged_path();
}

}  // namespace optgptq
