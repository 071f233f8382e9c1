// Work shared out among threads, and aligned memory for it.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>

namespace optgptq {

struct FreeAligned {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory that begins at a multiple of 64 bytes.
inline std::unique_ptr<void, FreeAligned> aligned_memory(std::size_t num_bytes) {
  void* memory = std::aligned_alloc(64, (num_bytes + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return std::unique_ptr<void, FreeAligned>(memory);
}

// Call `run(data)` in this thread and in up to `num_workers - 1` others at the same time, and return when all are done.
// There may be more or fewer calls than that, but always one. `run` must not throw.
void run_team(void (*run)(void*), void* data, std::int64_t num_workers) noexcept;

// What the threads of one call of `share_out` have in common.
template <class Work>
struct SharedWork {
  const Work& work;
  const std::int64_t num_items, num_workers;
  std::atomic<std::int64_t> next_item{0}, next_worker{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure{};

  void run() noexcept {
    const std::int64_t worker = next_worker++;
    if (worker >= num_workers) return;
    try {
      for (std::int64_t index = next_item++; index < num_items; index = next_item++) work(worker, index);
    } catch (...) {
      next_item = num_items;
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  }
};

// Call `work(worker, index)` for every index below `num_items`; `worker` is below `num_workers`.
// Which worker takes which index is open, so the result must not depend on it. The first exception is thrown again here;
// what was not begun by then is not done.
template <class Work>
void share_out(std::int64_t num_items, std::int64_t num_workers, const Work& work) {
  SharedWork<Work> shared{work, num_items, num_workers};
  if (num_workers < 2 || num_items < 2) {
    for (std::int64_t index = 0; index < num_items; ++index) work(0, index);
    return;
  }
  run_team([](void* data) { static_cast<SharedWork<Work>*>(data)->run(); }, &shared, num_workers);
  if (shared.failed) std::rethrow_exception(shared.failure);
}

}  // namespace optgptq
