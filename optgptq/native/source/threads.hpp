// Fork and join: threads live as long as one call. A pool would spin or sleep beside that of torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

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

// Call `work(worker, index)` for every index below `num_items`; `worker` is below `num_workers`.
// Which worker takes which index is open, so the result must not depend on it.
template <class Work>
void share_out(std::int64_t num_items, std::int64_t num_workers, const Work& work) {
  std::atomic<std::int64_t> next{0};
  const auto run = [&](std::int64_t worker) {
    for (std::int64_t index = next++; index < num_items; index = next++) work(worker, index);
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(num_workers));
  for (std::int64_t worker = 1; worker < num_workers; ++worker) {
    try {
      others.emplace_back(run, worker);
    } catch (const std::system_error&) {
      break;  // The system gives no more threads: those that run do the work.
    }
  }
  run(0);
  for (std::thread& other : others) other.join();
}

}  // namespace optgptq
