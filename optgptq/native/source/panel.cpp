// A panel: heads are shared out among threads. What Python calls, by ctypes; 0 means done.
#include "panel.hpp"

#include "threads.hpp"

extern "C" int optgptq_supported(int path);

namespace optgptq {
namespace {

constexpr int kDone = 0, kNoMemory = 1, kUnsupported = 2;
constexpr int kAvx2 = 1, kAvx512 = 2;

PanelPath<float> panel_path(int path, float) {
#if defined(__x86_64__)
  if (path == kAvx512) return avx512::panel_float();
  if (path == kAvx2) return avx2::panel_float();
#endif
  (void)path;
  return portable::panel_float();
}

PanelPath<double> panel_path(int path, double) {
#if defined(__x86_64__)
  if (path == kAvx512) return avx512::panel_double();
  if (path == kAvx2) return avx2::panel_double();
#endif
  (void)path;
  return portable::panel_double();
}

template <class T>
void round_panel(const PanelCall& call, int path_index, std::int64_t num_threads) {
  const PanelPath<T> path = panel_path(path_index, T());
  const std::int64_t num_tiles = (call.num_heads + path.lanes - 1) / path.lanes;
  const std::int64_t workers = num_tiles < num_threads ? num_tiles : num_threads;
  const std::int64_t size = packed_size(call.group.num_columns) + padded(call.group.num_columns);
  const auto packed = aligned_memory(static_cast<std::size_t>(size) * sizeof(T));
  pack_factor<T>(call.group, static_cast<T*>(packed.get()));
  const std::size_t bytes = (path.scratch_bytes(call) + 63) / 64 * 64;
  const auto scratch = aligned_memory(bytes * static_cast<std::size_t>(workers));
  share_out(num_tiles, workers, [&](std::int64_t worker, std::int64_t tile) {
    char* own = static_cast<char*>(scratch.get()) + bytes * static_cast<std::size_t>(worker);
    path.round_tile(call, static_cast<const T*>(packed.get()), own, tile);
  });
}

}  // namespace
}  // namespace optgptq

extern "C" __attribute__((visibility("default"))) int optgptq_round_panel(
    const optgptq::PanelCall* call, int number_bytes, int path, std::int64_t num_threads) {
  if (!optgptq_supported(path)) return optgptq::kUnsupported;
  try {
    if (number_bytes == 4) {
      optgptq::round_panel<float>(*call, path, num_threads);
    } else {
      optgptq::round_panel<double>(*call, path, num_threads);
    }
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
  return optgptq::kDone;
}
