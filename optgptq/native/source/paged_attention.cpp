// Paged attention: parts of sequences are shared out among threads. What Python calls, by ctypes; 0 means done.
#include "paged_attention.hpp"
#include "processor.hpp"
#include "threads.hpp"

extern "C" int optgptq_supported(int path);

namespace optgptq {
namespace {

constexpr int kDone = 0, kNoMemory = 1, kUnsupported = 2;
constexpr int kPortable = 0, kAvx2 = 1, kAvx512 = 2;
// Multiplications below which a second thread costs more than it does: a thread takes some 30 microseconds to begin.
constexpr double kWorkPerThread = 8e6;
// Numbers to store below which a second thread costs more than it does.
constexpr std::int64_t kNumbersPerThread = 1 << 18;
// Query heads of one key/value head that are worked on one after the other while a tile of keys is in the cache.
constexpr std::int64_t kRowsPerItem = 32;

// A vector of keys must not leave its page: shorter vectors where pages are no multiple of it.
PagedPath path_of(int path, std::int64_t page_size) {
#if defined(__x86_64__)
  static const bool halves = converts_halves();
  if (halves && path == kAvx512 && page_size % 16 == 0) return avx512::paged_path();
  if (halves && path >= kAvx2 && page_size % 8 == 0) return avx2::paged_path();
#endif
  (void)path, (void)page_size;
  return portable::paged_path();
}

double num_multiplications(const PagedCall& call) {
  double pairs = 0;
  for (std::int64_t index = 0; index < call.sequences.num_sequences; ++index) {
    const double num_new = call.sequences.query_start[index + 1] - call.sequences.query_start[index];
    const double context = call.sequences.context[index], window = static_cast<double>(call.rule.window);
    pairs += num_new * (window > 0 && window < context ? window : context);
  }
  return 2.0 * pairs * static_cast<double>(call.num_heads * call.pages.head_dim);
}

}  // namespace

void attend_pages(const PagedCall& call, int path_index, std::int64_t num_threads) {
  const PagedPath path = path_of(path_index, call.pages.page_size);
  const std::int64_t heads = call.pages.num_kv_heads, group_size = call.num_heads / heads;
  const std::int64_t most_tokens = group_size < kRowsPerItem ? kRowsPerItem / group_size : 1;
  const std::int64_t longest = call.sequences.max_query;
  const std::int64_t tokens = longest < most_tokens ? longest : most_tokens;
  if (tokens == 0) return;
  const std::int64_t parts = (longest + tokens - 1) / tokens;
  const std::int64_t num_items = call.sequences.num_sequences * parts * heads;
  const auto worth = static_cast<std::int64_t>(num_multiplications(call) / kWorkPerThread) + 1;
  const std::int64_t most = num_items < num_threads ? num_items : num_threads;
  const std::int64_t workers = worth < most ? worth : most;
  const std::size_t bytes = (path.scratch_bytes(call, tokens * group_size) + 63) / 64 * 64;
  const auto scratch = aligned_memory(bytes * static_cast<std::size_t>(workers));
  share_out(num_items, workers, [&](std::int64_t worker, std::int64_t index) {
    const std::int64_t sequence = index / heads / parts, first = index / heads % parts * tokens;
    const std::int64_t num_new = call.sequences.query_start[sequence + 1] - call.sequences.query_start[sequence];
    const std::int64_t rest = num_new - first;
    if (rest <= 0) return;
    char* own = static_cast<char*>(scratch.get()) + bytes * static_cast<std::size_t>(worker);
    path.attend(call, {sequence, index % heads, first, rest < tokens ? rest : tokens}, own);
  });
}

void store_pages(const StoreCall& call, int path_index, std::int64_t num_threads) {
  const PagedPath path = path_of(path_index, call.pages.page_size);
  const std::int64_t heads = call.pages.num_kv_heads;
  const std::int64_t worth = call.num_tokens * heads * call.pages.head_dim / kNumbersPerThread + 1;
  const std::int64_t most = heads < num_threads ? heads : num_threads;
  share_out(heads, worth < most ? worth : most, [&](std::int64_t, std::int64_t head) { path.store(call, head); });
}

}  // namespace optgptq

#define OPTGPTQ_EXPORT extern "C" __attribute__((visibility("default")))

OPTGPTQ_EXPORT int optgptq_paged_attention(const optgptq::PagedCall* call, int path, std::int64_t num_threads) {
  if (!optgptq_supported(path)) return optgptq::kUnsupported;
  try {
    optgptq::attend_pages(*call, path, num_threads);
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
  return optgptq::kDone;
}

OPTGPTQ_EXPORT int optgptq_store_tokens(const optgptq::StoreCall* call, int path, std::int64_t num_threads) {
  if (!optgptq_supported(path)) return optgptq::kUnsupported;
  try {
    optgptq::store_pages(*call, path, num_threads);
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
  return optgptq::kDone;
}

// For tests: exp(x) where x <= 0 if `hyperbolic` is 0, else tanh(x).
OPTGPTQ_EXPORT int optgptq_attention_function(
    const float* from, float* to, std::int64_t size, int hyperbolic, int path) {
  if (!optgptq_supported(path)) return optgptq::kUnsupported;
  const optgptq::PagedPath functions = optgptq::path_of(path, 16);
  (hyperbolic != 0 ? functions.tangent : functions.exponential)(from, to, size);
  return optgptq::kDone;
}
