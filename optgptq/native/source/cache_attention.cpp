// Attention over codes: parts of sequences are shared out among threads. What Python calls, by ctypes; 0 means done.
#include "cache_attention.hpp"
#include "processor.hpp"
#include "threads.hpp"

extern "C" int optgptq_supported(int path);

namespace optgptq {
namespace {

constexpr int kDone = 0, kNoMemory = 1, kUnsupported = 2;
constexpr int kAvx2 = 1, kAvx512 = 2;
// As in `paged_attention.cpp`: a thread takes some 30 microseconds to begin.
constexpr double kWorkPerThread = 8e6;
constexpr std::int64_t kRowsPerItem = 32;
// Tokens of one head that are stored one after the other.
constexpr std::int64_t kStoredTokens = 16;

CachePath path_of(int path) {
#if defined(__x86_64__)
  static const bool halves = converts_halves();
  if (halves && path == kAvx512) return avx512::cache_path();
  if (halves && path >= kAvx2) return avx2::cache_path();
#endif
  (void)path;
  return portable::cache_path();
}

double num_multiplications(const CacheCall& call) {
  double pairs = 0;
  for (std::int64_t index = 0; index < call.sequences.num_sequences; ++index) {
    const double num_new = call.sequences.query_start[index + 1] - call.sequences.query_start[index];
    const double context = call.sequences.context[index], window = static_cast<double>(call.rule.window);
    pairs += num_new * (window > 0 && window < context ? window : context);
  }
  return 2.0 * pairs * static_cast<double>(call.num_heads * call.pages.exact.head_dim);
}

std::int64_t num_workers(double work, std::int64_t num_items, std::int64_t num_threads) {
  const auto worth = static_cast<std::int64_t>(work / kWorkPerThread) + 1;
  const std::int64_t most = num_items < num_threads ? num_items : num_threads;
  return worth < most ? worth : most;
}

// Each worker has its own part of one piece of memory.
template <class Work>
void share_out_space(std::int64_t num_items, std::int64_t workers, std::size_t num_bytes, const Work& work) {
  const std::size_t bytes = (num_bytes + 63) / 64 * 64;
  const auto scratch = aligned_memory(bytes * static_cast<std::size_t>(workers));
  share_out(num_items, workers, [&](std::int64_t worker, std::int64_t index) {
    work(index, static_cast<char*>(scratch.get()) + bytes * static_cast<std::size_t>(worker));
  });
}

void attend(const CacheCall& call, int path_index, std::int64_t num_threads) {
  const CachePath path = path_of(path_index);
  const std::int64_t heads = call.pages.exact.num_kv_heads, group_size = call.num_heads / heads;
  const std::int64_t most_tokens = group_size < kRowsPerItem ? kRowsPerItem / group_size : 1;
  const std::int64_t longest = call.sequences.max_query;
  const std::int64_t tokens = longest < most_tokens ? longest : most_tokens;
  if (tokens == 0) return;
  const std::int64_t parts = (longest + tokens - 1) / tokens;
  const std::int64_t num_items = call.sequences.num_sequences * parts * heads;
  const std::int64_t workers = num_workers(num_multiplications(call), num_items, num_threads);
  const std::size_t bytes = path.attend_bytes(call, tokens * group_size);
  share_out_space(num_items, workers, bytes, [&](std::int64_t index, void* own) {
    const std::int64_t sequence = index / heads / parts, first = index / heads % parts * tokens;
    const std::int64_t num_new = call.sequences.query_start[sequence + 1] - call.sequences.query_start[sequence];
    const std::int64_t rest = num_new - first;
    if (rest <= 0) return;
    path.attend(call, {sequence, index % heads, first, rest < tokens ? rest : tokens}, own);
  });
}

// Operations that making the codes of one vector takes, in multiplications of attention.
double work_of_side(const CacheSide& side, std::int64_t head_dim) {
  const auto size = static_cast<double>(head_dim);
  if (side.bits == kExactBits) return size;
  const double ranges = size * 8.0 * static_cast<double>(side.num_ranges);
  return side.metric == nullptr ? ranges : ranges + 4.0 * size * size + 100.0 * size;
}

void store(const CacheStoreCall& call, int path_index, std::int64_t num_threads) {
  if (call.num_tokens == 0) return;
  const CachePath path = path_of(path_index);
  const Pages& shape = call.pages.exact;
  const CacheSide &keys = call.pages.keys, &values = call.pages.values;
  const double of_vector = work_of_side(keys, shape.head_dim) + work_of_side(values, shape.head_dim);
  const double work = of_vector * static_cast<double>(call.num_tokens * shape.num_kv_heads);
  const std::int64_t parts = (call.num_tokens + kStoredTokens - 1) / kStoredTokens;
  const std::size_t bytes = path.store_bytes(call);
  std::int64_t num_items = parts * shape.num_kv_heads;
  const bool some_by_channel = keys.along_tokens == 0 || values.along_tokens == 0;
  const bool some_by_token = keys.along_tokens != 0 || values.along_tokens != 0;
  if (some_by_channel) {
    share_out_space(num_items, num_workers(work, num_items, num_threads), bytes, [&](std::int64_t index, void* own) {
      const std::int64_t first = index / shape.num_kv_heads * kStoredTokens, rest = call.num_tokens - first;
      path.store(call, {index % shape.num_kv_heads, first, rest < kStoredTokens ? rest : kStoredTokens, 0}, own);
    });
  }
  if (!some_by_token) return;
  num_items = call.sequences.num_sequences * shape.num_kv_heads;
  share_out_space(num_items, num_workers(work, num_items, num_threads), bytes, [&](std::int64_t index, void* own) {
    path.store_groups(call, {index % shape.num_kv_heads, 0, 0, index / shape.num_kv_heads}, own);
  });
}

}  // namespace
}  // namespace optgptq

#define OPTGPTQ_EXPORT extern "C" __attribute__((visibility("default")))

OPTGPTQ_EXPORT int optgptq_attend_codes(const optgptq::CacheCall* call, int path, std::int64_t num_threads) {
  if (!optgptq_supported(path)) return optgptq::kUnsupported;
  try {
    optgptq::attend(*call, path, num_threads);
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
  return optgptq::kDone;
}

OPTGPTQ_EXPORT int optgptq_store_codes(const optgptq::CacheStoreCall* call, int path, std::int64_t num_threads) {
  if (!optgptq_supported(path)) return optgptq::kUnsupported;
  try {
    optgptq::store(*call, path, num_threads);
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
  return optgptq::kDone;
}
