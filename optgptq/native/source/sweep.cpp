// Long rows: shared out among threads. What Python calls, by ctypes; 0 means done.
#include "sweep.hpp"

#include "threads.hpp"

extern "C" int optgptq_supported(int path);

namespace optgptq {
namespace {

constexpr int kDone = 0, kNoMemory = 1, kUnsupported = 2;
constexpr int kAvx2 = 1, kAvx512 = 2;
// Rows that are swept together: each pass over the moment serves all of them.
constexpr std::int64_t kRowsSwept = 512;
// Most groups of rows in wide tiles: work space grows with the square of the groups.
constexpr std::int64_t kGroupsOfWideTiles = 256;

SweepPath<float> sweep_path(int path, float) {
#if defined(__x86_64__)
  if (path == kAvx512) return avx512::sweep_float();
  if (path == kAvx2) return avx2::sweep_float();
#endif
  (void)path;
  return portable::sweep_float();
}

SweepPath<double> sweep_path(int path, double) {
#if defined(__x86_64__)
  if (path == kAvx512) return avx512::sweep_double();
  if (path == kAvx2) return avx2::sweep_double();
#endif
  (void)path;
  return portable::sweep_double();
}

std::int64_t num_tiles(const SweepCall& call, std::int64_t rows) { return (call.num_rows + rows - 1) / rows; }

// Call `work(scratch, begin)` for every tile of rows; returns whether one of them says that something changed.
template <class Work>
bool for_tiles(const SweepCall& call, std::int64_t rows, std::size_t bytes, std::int64_t num_threads, const Work& work) {
  const std::int64_t tiles = num_tiles(call, rows), workers = tiles < num_threads ? tiles : num_threads;
  const std::size_t aligned = (bytes + 63) / 64 * 64;
  const auto scratch = aligned_memory(aligned * static_cast<std::size_t>(workers));
  std::atomic<bool> changed{false};
  share_out(tiles, workers, [&](std::int64_t worker, std::int64_t tile) {
    char* own = static_cast<char*>(scratch.get()) + aligned * static_cast<std::size_t>(worker);
    if (work(own, tile * rows)) changed = true;
  });
  return changed;
}

template <class T>
bool run(const SweepCall& call, int path_index, std::int64_t num_threads) {
  const SweepPath<T> path = sweep_path(path_index, T());
  if (call.action == kSweeps) {
    const std::int64_t share = (call.num_rows + num_threads - 1) / num_threads;
    const std::int64_t rows = share < kRowsSwept ? share : kRowsSwept;
    return for_tiles(call, rows, path.sweep_bytes(call, rows), num_threads, [&](void* scratch, std::int64_t begin) {
      const std::int64_t rest = call.num_rows - begin;
      return path.sweep(call, scratch, begin, rest < rows ? rest : rows);
    });
  }
  const bool is_wide = call.num_rows >= path.wide * path.lanes && num_groups(call) <= kGroupsOfWideTiles;
  const std::int64_t vectors = is_wide ? path.wide : 1;
  const auto one = call.action == kGradient ? path.gradient : path.refit;
  const std::size_t bytes = path.tile_bytes(call, vectors);
  return for_tiles(call, vectors * path.lanes, bytes, num_threads, [&](void* scratch, std::int64_t begin) {
    return one(call, scratch, begin, vectors);
  });
}

}  // namespace
}  // namespace optgptq

extern "C" __attribute__((visibility("default"))) int optgptq_sweep_rows(
    optgptq::SweepCall* call, int number_bytes, int path, std::int64_t num_threads) {
  if (!optgptq_supported(path)) return optgptq::kUnsupported;
  if (call->num_rows == 0) return optgptq::kDone;
  try {
    if (number_bytes == 4) {
      call->changed = optgptq::run<float>(*call, path, num_threads);
    } else {
      call->changed = optgptq::run<double>(*call, path, num_threads);
    }
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
  return optgptq::kDone;
}
