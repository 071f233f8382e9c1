// What lies between products: rows and tokens are shared out among threads. What Python calls, by ctypes; 0: done.
#include "leaves.hpp"

#include <vector>

#include "processor.hpp"
#include "threads.hpp"

extern "C" int optgptq_supported(int path);

namespace optgptq {
namespace {

constexpr int kDone = 0, kNoMemory = 1, kUnsupported = 2;
constexpr int kAvx2 = 1, kAvx512 = 2;
// Numbers below which a second thread costs more than it does.
constexpr std::int64_t kNumbersPerThread = 1 << 18;
// Exponentials take longer than sums.
constexpr std::int64_t kGatesPerThread = 1 << 16;
constexpr std::int64_t kDrawnPerThread = 1 << 15;
constexpr std::int64_t kGatesPerItem = 1 << 12;
// Numbers of the rows that a thread takes at a time: what it costs to take them is little beside them.
constexpr std::int64_t kNumbersPerItem = 1 << 12;

LeavesPath leaves_of(int path) {
#if defined(__x86_64__)
  static const bool halves = converts_halves();
  if (halves && path == kAvx512) return avx512::leaves_path();
  if (halves && path >= kAvx2) return avx2::leaves_path();
#endif
  (void)path;
  return portable::leaves_path();
}

std::int64_t num_workers(std::int64_t num_items, std::int64_t worth, std::int64_t num_threads) {
  const std::int64_t most = num_items < num_threads ? num_items : num_threads;
  return worth < most ? worth : most;
}

// Call `work(row)` for all rows, runs of them by each thread.
template <class Work>
void share_rows(std::int64_t num_rows, std::int64_t numbers_of_row, std::int64_t num_threads, const Work& work) {
  const std::int64_t run = kNumbersPerItem / (numbers_of_row + 1) + 1, num_items = (num_rows + run - 1) / run;
  const std::int64_t worth = num_rows * numbers_of_row / kNumbersPerThread + 1;
  share_out(num_items, num_workers(num_items, worth, num_threads), [&](std::int64_t, std::int64_t item) {
    const std::int64_t end = (item + 1) * run < num_rows ? (item + 1) * run : num_rows;
    for (std::int64_t row = item * run; row < end; ++row) work(row);
  });
}

void gate(const GatedCall& call, int path_index, std::int64_t num_threads) {
  const LeavesPath path = leaves_of(path_index);
  // A few long rows are divided; of short ones a thread takes several.
  const std::int64_t parts = (call.size + kGatesPerItem - 1) / kGatesPerItem;
  const std::int64_t run = parts > 1 ? 1 : kGatesPerItem / (call.size + 1) + 1;
  const std::int64_t num_items = (call.num_rows + run - 1) / run * parts;
  const std::int64_t worth = call.num_rows * call.size / kGatesPerThread + 1;
  share_out(num_items, num_workers(num_items, worth, num_threads), [&](std::int64_t, std::int64_t item) {
    const std::int64_t begin = item % parts * kGatesPerItem, end = begin + kGatesPerItem;
    const std::int64_t first = item / parts * run, last = first + run < call.num_rows ? first + run : call.num_rows;
    for (std::int64_t row = first; row < last; ++row) path.gated(call, row, begin, end < call.size ? end : call.size);
  });
}

void draw(const DrawCall& call, std::int64_t* places, int path_index, std::int64_t num_threads) {
  const LeavesPath path = leaves_of(path_index);
  const std::int64_t worth = call.num_rows * call.size / kDrawnPerThread + 1;
  const std::int64_t workers = num_workers(call.num_rows, worth, num_threads);
  std::vector<std::int64_t> weights(static_cast<std::size_t>(workers * call.size));
  share_out(call.num_rows, workers, [&](std::int64_t worker, std::int64_t row) {
    places[row] = path.draw(call, row, weights.data() + worker * call.size);
  });
}

void attend_joint(const JointCall& call, int path_index, std::int64_t num_threads) {
  const LeavesPath path = leaves_of(path_index);
  const JointStep& step = *call.step;
  const std::int64_t queries = call.num_heads * call.pages.head_dim;
  const std::int64_t keys = call.pages.num_kv_heads * call.pages.head_dim, stride = queries + 2 * keys;
  const auto share = [&](const auto& work) { share_rows(step.num_tokens, stride, num_threads, work); };
  share([&](std::int64_t token) { path.open_token(call, token); });
  const std::int64_t head_dim = call.pages.head_dim;
  const float* key = step.heads + queries;
  store_pages(
      {call.pages, key, key + keys, step.slot, stride, head_dim, stride, head_dim, step.num_tokens}, path_index,
      num_threads);
  const bool in_place = call.type == NumberType::kFloat;
  float* output = in_place ? static_cast<float*>(call.output) : step.attended;
  attend_pages(
      {call.pages, step.sequences, call.rule, step.heads, output, stride, head_dim, call.num_heads}, path_index,
      num_threads);
  if (!in_place) share([&](std::int64_t token) { path.close_token(call, token); });
}

template <class Work>
int done(int path, const Work& work) {
  if (!optgptq_supported(path)) return kUnsupported;
  try {
    work();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kDone;
}

}  // namespace
}  // namespace optgptq

#define OPTGPTQ_EXPORT extern "C" __attribute__((visibility("default")))

OPTGPTQ_EXPORT int optgptq_sum_and_norm(const optgptq::SumNormCall* call, int path, std::int64_t num_threads) {
  return optgptq::done(path, [=] {
    const optgptq::LeavesPath leaves = optgptq::leaves_of(path);
    optgptq::share_rows(
        call->num_rows, call->size, num_threads, [&](std::int64_t row) { leaves.sum_and_norm(*call, row); });
  });
}

OPTGPTQ_EXPORT int optgptq_gated(const optgptq::GatedCall* call, int path, std::int64_t num_threads) {
  return optgptq::done(path, [=] { optgptq::gate(*call, path, num_threads); });
}

OPTGPTQ_EXPORT int optgptq_attend_joint(const optgptq::JointCall* call, int path, std::int64_t num_threads) {
  return optgptq::done(path, [=] { optgptq::attend_joint(*call, path, num_threads); });
}

// The place of the greatest number of each row of `size` floats.
OPTGPTQ_EXPORT int optgptq_greatest(
    const float* numbers, std::int64_t* places, std::int64_t num_rows, std::int64_t size, int path,
    std::int64_t num_threads) {
  return optgptq::done(path, [=] {
    const optgptq::LeavesPath leaves = optgptq::leaves_of(path);
    optgptq::share_rows(num_rows, size, num_threads, [&](std::int64_t row) {
      places[row] = leaves.greatest(numbers + row * size, size);
    });
  });
}

// The place that each row's random number falls on.
OPTGPTQ_EXPORT int optgptq_draw(
    const optgptq::DrawCall* call, std::int64_t* places, int path, std::int64_t num_threads) {
  return optgptq::done(path, [=] { optgptq::draw(*call, places, path, num_threads); });
}
