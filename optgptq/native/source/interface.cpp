// What Python calls, by ctypes: plain functions over pointers. 0 means done.
#include "group.hpp"
#include "moment.hpp"
#include "refine.hpp"
#include "threads.hpp"

namespace optgptq {
namespace {

constexpr int kDone = 0, kNoMemory = 1, kUnsupported = 2;
constexpr int kPortable = 0, kAvx2 = 1, kAvx512 = 2;
// Multiplications below which a second thread costs more than it does.
constexpr double kWorkPerThread = 4e6;
// Most groups of rows that are refined in wide tiles.
constexpr std::int64_t kGroupsOfWideTiles = 64;

bool supported(int path) {
#if defined(__x86_64__)
  if (path == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (path == kAvx512) {
    return supported(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return path == kPortable;
}

template <class T>
Path<T> path_of(int path);

template <>
Path<float> path_of<float>(int path) {
#if defined(__x86_64__)
  if (path == kAvx512) return avx512::path_float();
  if (path == kAvx2) return avx2::path_float();
#endif
  (void)path;
  return portable::path_float();
}

template <>
Path<double> path_of<double>(int path) {
#if defined(__x86_64__)
  if (path == kAvx512) return avx512::path_double();
  if (path == kAvx2) return avx2::path_double();
#endif
  (void)path;
  return portable::path_double();
}

template <class T>
RefinePath<T> refine_path_of(int path);

template <>
RefinePath<float> refine_path_of<float>(int path) {
#if defined(__x86_64__)
  if (path == kAvx512) return avx512::refine_float();
  if (path == kAvx2) return avx2::refine_float();
#endif
  (void)path;
  return portable::refine_float();
}

template <>
RefinePath<double> refine_path_of<double>(int path) {
#if defined(__x86_64__)
  if (path == kAvx512) return avx512::refine_double();
  if (path == kAvx2) return avx2::refine_double();
#endif
  (void)path;
  return portable::refine_double();
}

std::int64_t num_workers(const GroupCall& call, std::int64_t num_tiles, std::int64_t num_threads) {
  const double weights = static_cast<double>(call.num_rows) * static_cast<double>(call.num_columns);
  const double tried = call.num_shares > 0 && call.given_scale == nullptr ? 300.0 : 0.0;
  const double walked = call.error == nullptr ? 0.0 : static_cast<double>(call.num_columns * call.count);
  const auto worth = static_cast<std::int64_t>(weights * (tried + walked) / kWorkPerThread) + 1;
  const std::int64_t most = num_tiles < num_threads ? num_tiles : num_threads;
  return worth < most ? worth : most;
}

template <class T>
void round_group(const GroupCall& call, int path_index, std::int64_t num_threads) {
  if (call.num_rows == 0) return;
  const Path<T> path = path_of<T>(path_index);
  const std::int64_t num_tiles = (call.num_rows + path.lanes - 1) / path.lanes;
  const std::int64_t workers = num_workers(call, num_tiles, num_threads);
  std::unique_ptr<void, FreeAligned> packed;
  if (call.upper != nullptr) {
    const std::int64_t size = packed_size(call.num_columns) + padded(call.num_columns);
    packed = aligned_memory(static_cast<std::size_t>(size) * sizeof(T));
    pack_factor<T>(call, static_cast<T*>(packed.get()));
  }
  const std::size_t bytes = (path.scratch_bytes(call) + 63) / 64 * 64;
  const auto scratch = aligned_memory(bytes * static_cast<std::size_t>(workers));
  share_out(num_tiles, workers, [&](std::int64_t worker, std::int64_t tile) {
    char* own = static_cast<char*>(scratch.get()) + bytes * static_cast<std::size_t>(worker);
    path.round_tile(call, static_cast<const T*>(packed.get()), own, tile);
  });
}

template <class T>
void refine_rows(RefineCall& call, int path_index, std::int64_t num_threads) {
  const RefinePath<T> path = refine_path_of<T>(path_index);
  // Work space grows with the square of the groups.
  const bool is_wide = call.num_rows >= path.wide * path.lanes && num_groups(call) <= kGroupsOfWideTiles;
  const std::int64_t vectors = is_wide ? path.wide : 1, rows = vectors * path.lanes;
  const std::int64_t num_tiles = (call.num_rows + rows - 1) / rows;
  const double products = static_cast<double>(call.num_columns) * static_cast<double>(call.num_columns);
  const auto passes = static_cast<double>(call.rounds * (call.code_sweeps + 2 * call.scale_refit));
  const auto worth = static_cast<std::int64_t>(products * static_cast<double>(call.num_rows) * passes / kWorkPerThread);
  const std::int64_t most = num_tiles < num_threads ? num_tiles : num_threads;
  const std::int64_t workers = worth + 1 < most ? worth + 1 : most;
  const std::size_t bytes = (path.scratch_bytes(call, vectors) + 63) / 64 * 64;
  const auto scratch = aligned_memory(bytes * static_cast<std::size_t>(workers));
  std::atomic<bool> changed{false};
  share_out(num_tiles, workers, [&](std::int64_t worker, std::int64_t tile) {
    char* own = static_cast<char*>(scratch.get()) + bytes * static_cast<std::size_t>(worker);
    if (path.refine_tile(call, own, tile * rows, vectors)) changed = true;
  });
  call.changed = changed;
}

}  // namespace
}  // namespace optgptq

#define OPTGPTQ_EXPORT extern "C" __attribute__((visibility("default")))

OPTGPTQ_EXPORT int optgptq_supported(int path) { return optgptq::supported(path); }

OPTGPTQ_EXPORT int optgptq_has_bfloat16_products() { return optgptq::has_bfloat16_products(); }

OPTGPTQ_EXPORT int optgptq_round_group(
    const optgptq::GroupCall* call, int number_bytes, int path, std::int64_t num_threads) {
  if (!optgptq::supported(path)) return optgptq::kUnsupported;
  try {
    if (number_bytes == 4) {
      optgptq::round_group<float>(*call, path, num_threads);
    } else {
      optgptq::round_group<double>(*call, path, num_threads);
    }
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
  return optgptq::kDone;
}

OPTGPTQ_EXPORT int optgptq_refine_rows(
    optgptq::RefineCall* call, int number_bytes, int path, std::int64_t num_threads) {
  if (!optgptq::supported(path)) return optgptq::kUnsupported;
  try {
    if (number_bytes == 4) {
      optgptq::refine_rows<float>(*call, path, num_threads);
    } else {
      optgptq::refine_rows<double>(*call, path, num_threads);
    }
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
  return optgptq::kDone;
}

OPTGPTQ_EXPORT int optgptq_add_bfloat16_products(
    const std::uint16_t* left, std::int64_t left_stride, std::int64_t num_left, const std::uint16_t* right,
    std::int64_t right_stride, std::int64_t num_right, std::int64_t num_tokens, float* sum, std::int64_t sum_stride,
    optgptq::PairWay way, std::int64_t num_threads) {
  try {
    const bool done = optgptq::add_bfloat16_products(
        {left, left_stride, num_left}, {right, right_stride, num_right}, num_tokens, sum, sum_stride,
        way, num_threads);
    return done ? optgptq::kDone : optgptq::kUnsupported;
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
}
