// Threads that wait for work: where torch's OpenMP library is not found, and in the child of a fork.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace optgptq {

// One piece of work at a time; who finds the pool taken, from another thread or from inside a piece of work, works alone.
class Pool {
 public:
  void run(void (*work)(void*), void* data, std::int64_t num_workers) {
    if (taken_.exchange(true, std::memory_order_acquire)) return work(data);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_threads(static_cast<std::size_t>(num_workers - 1));
      work_ = work;
      data_ = data;
      const auto ready = static_cast<std::int64_t>(threads_.size());
      open_ = num_workers - 1 < ready ? num_workers - 1 : ready;
    }
    begin_.notify_all();
    work(data);
    // What is left of the work is in hand: who has not begun need not.
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = 0;
    end_.wait(lock, [&] { return num_working_ == 0; });
    lock.unlock();
    taken_.store(false, std::memory_order_release);
  }

  // End the threads and wait for them, unless something still runs; then the end of the process ends them.
  void stop() {
    if (taken_.exchange(true, std::memory_order_acquire)) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    begin_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  // Looks at `open_` before a thread sleeps, some tens of microseconds: the next product of a decode step comes sooner.
  static constexpr int kLooks = 2000;

  void start_threads(std::size_t wanted) {
    try {
      threads_.reserve(wanted);
      while (threads_.size() < wanted) threads_.emplace_back([this] { live(); });
    } catch (const std::system_error&) {
      // The system gives no more threads: those that run do the work.
    } catch (const std::bad_alloc&) {
    }
  }

  void live() {
    std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
    for (;;) {
      for (int look = 0; look < kLooks && open_.load(std::memory_order_relaxed) == 0; ++look) pause();
      lock.lock();
      begin_.wait(lock, [&] { return open_ > 0 || stopping_; });
      if (stopping_) return;
      --open_;
      ++num_working_;
      const auto work = work_;
      const auto data = data_;
      lock.unlock();
      work(data);
      lock.lock();
      if (--num_working_ == 0) end_.notify_one();
      lock.unlock();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::atomic<bool> taken_{false};
  std::mutex mutex_;
  std::condition_variable begin_, end_;
  std::vector<std::thread> threads_;
  // Under `mutex_`; `open_`, places for workers that nobody has taken yet, is also looked at without it.
  std::atomic<std::int64_t> open_{0};
  std::int64_t num_working_ = 0;
  void (*work_)(void*) = nullptr;
  void* data_ = nullptr;
  bool stopping_ = false;
};

}  // namespace optgptq
