// Which threads work: the team of the OpenMP library that torch has loaded, or threads of our own.
#include "threads.hpp"

#include <pthread.h>

#include "pool.hpp"

namespace optgptq {
namespace {

// GOMP_parallel of libgomp: run(data) in each of `num_threads` threads; 0 asks for as many as the caller's OpenMP does.
using Team = void (*)(void (*run)(void*), void* data, unsigned num_threads, unsigned flags);

std::atomic<Team> team{nullptr};
// The child of a fork has none of its parent's threads, and libgomp would wait for them for ever.
std::atomic<bool> forked{false};
std::atomic<Pool*> own{nullptr};

void forget_threads() {
  forked = true;
  own = nullptr;  // Its locks may be held by threads that are not here: nothing of it is touched again.
}

[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, forget_threads);

Pool* own_pool() {
  Pool* pool = own;
  if (pool != nullptr) return pool;
  Pool* fresh = new (std::nothrow) Pool;
  if (fresh == nullptr || own.compare_exchange_strong(pool, fresh)) return fresh;
  delete fresh;
  return pool;
}

// Before the process ends its threads are told to, so that none runs while its memory goes.
struct Ending {
  ~Ending() {
    if (Pool* pool = own.exchange(nullptr)) pool->stop();
  }
} ending;

}  // namespace

void run_team(void (*run)(void*), void* data, std::int64_t num_workers) noexcept {
  const Team with = team.load(std::memory_order_relaxed);
  if (with != nullptr && !forked.load(std::memory_order_relaxed)) {
    // A team of another size would make libgomp end some of its threads and start them again for torch.
    with(run, data, 0, 0);
  } else if (Pool* pool = own_pool()) {
    pool->run(run, data, num_workers);
  } else {
    run(data);
  }
}

}  // namespace optgptq

extern "C" {

// Let the work be done by the team of this function, GOMP_parallel of torch's own OpenMP library; null: by own threads.
// Return whether it will be.
__attribute__((visibility("default"))) int optgptq_use_team(void* parallel) {
#if defined(OPTGPTQ_OWN_THREADS)
  parallel = nullptr;  // A sanitizer does not see what an OpenMP library does.
#endif
  optgptq::team = reinterpret_cast<optgptq::Team>(parallel);
  return parallel != nullptr;
}

// For tests: run items that each add their number to their place, or that fail, and return how many workers there were.
__attribute__((visibility("default"))) std::int64_t optgptq_try_threads(
    std::int64_t* places, std::int64_t num_items, std::int64_t num_threads, std::int64_t failing) {
  std::atomic<std::uint64_t> workers{0};
  try {
    optgptq::share_out(num_items, num_threads, [&](std::int64_t worker, std::int64_t index) {
      workers |= std::uint64_t{1} << (worker % 64);
      if (index == failing) throw std::bad_alloc();
      places[index] += index;
    });
  } catch (const std::bad_alloc&) {
    return -1;
  }
  std::int64_t count = 0;
  for (std::uint64_t bits = workers; bits != 0; bits &= bits - 1) ++count;
  return count;
}
}
