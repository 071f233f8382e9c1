// What Python calls, by ctypes: plain functions over pointers. 0 means done.
#include "group.hpp"
#include "moment.hpp"
#include "threads.hpp"

namespace optgptq {
namespace {

constexpr int kDone = 0, kNoMemory = 1, kUnsupported = 2;
constexpr int kPortable = 0, kAvx2 = 1, kAvx512 = 2;
// Multiplications below which a second thread costs more than it does.
constexpr double kWorkPerThread = 4e6;

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

OPTGPTQ_EXPORT int optgptq_add_bfloat16_moment(
    const std::uint16_t* inputs, std::int64_t inputs_stride, std::int64_t num_tokens, std::int64_t num_columns,
    float* sum, std::int64_t sum_stride, std::int64_t num_threads) {
  try {
    const bool done = optgptq::add_bfloat16_moment(
        inputs, inputs_stride, num_tokens, num_columns, sum, sum_stride, num_threads);
    return done ? optgptq::kDone : optgptq::kUnsupported;
  } catch (const std::bad_alloc&) {
    return optgptq::kNoMemory;
  }
}
