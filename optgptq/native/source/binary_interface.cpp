// What Python calls for binary codes, by ctypes: plain functions over pointers. 0 means done.
#include "binary.hpp"
#include "group.hpp"
#include "threads.hpp"

#define OPTGPTQ_EXPORT extern "C" __attribute__((visibility("default")))

OPTGPTQ_EXPORT int optgptq_supported(int path);

namespace optgptq {
namespace {

constexpr int kDone = 0, kNoMemory = 1, kUnsupported = 2;
constexpr int kAvx2 = 1, kAvx512 = 2;
// Multiplications below which a second thread costs more than it does.
constexpr double kWorkPerThread = 4e6;

template <class T>
BinaryPath<T> path_of(int path);

template <>
BinaryPath<float> path_of<float>(int path) {
#if defined(__x86_64__)
  if (path == kAvx512) return avx512::binary_float();
  if (path == kAvx2) return avx2::binary_float();
#endif
  (void)path;
  return portable::binary_float();
}

template <>
BinaryPath<double> path_of<double>(int path) {
#if defined(__x86_64__)
  if (path == kAvx512) return avx512::binary_double();
  if (path == kAvx2) return avx2::binary_double();
#endif
  (void)path;
  return portable::binary_double();
}

// Call `work(scratch, tile)` for all tiles of rows, by as many threads as `work_per_row` is worth.
template <class Work>
void for_tiles(
    std::int64_t num_rows, std::int64_t lanes, double work_per_row, std::int64_t num_threads, std::size_t scratch_bytes,
    const Work& work) {
  const std::int64_t num_tiles = (num_rows + lanes - 1) / lanes;
  const auto worth = static_cast<std::int64_t>(work_per_row * static_cast<double>(num_rows) / kWorkPerThread) + 1;
  const std::int64_t most = num_tiles < num_threads ? num_tiles : num_threads;
  const std::int64_t workers = worth < most ? worth : most;
  if (workers == 0) return;
  const std::size_t bytes = (scratch_bytes + 63) / 64 * 64;
  const auto scratch = aligned_memory(bytes * static_cast<std::size_t>(workers) + 64);
  share_out(num_tiles, workers, [&](std::int64_t worker, std::int64_t tile) {
    work(static_cast<char*>(scratch.get()) + bytes * static_cast<std::size_t>(worker), tile);
  });
}

// The triangle of a group as all tiles read it, and what its columns, or all its rows, sum up to.
template <class T>
class Packed {
 public:
  Packed(const void* matrix, std::int64_t stride, std::int64_t num_columns, bool is_triangle) {
    GroupCall call = {};
    call.upper = matrix;
    call.upper_stride = stride;
    call.num_columns = num_columns;
    const std::int64_t size = packed_size(num_columns) + padded(num_columns);
    memory_ = aligned_memory(static_cast<std::size_t>(size + num_columns) * sizeof(T));
    T* numbers = static_cast<T*>(memory_.get());
    pack_factor<T>(call, numbers);
    sums_ = numbers + size;
    const T* from = static_cast<const T*>(matrix);
    for (std::int64_t column = 0; column < num_columns; ++column) {
      const std::int64_t end = is_triangle ? column + 1 : num_columns;
      sums_[column] = T(0);
      for (std::int64_t row = 0; row < end; ++row) sums_[column] += from[row * stride + column];
    }
  }

  PackedGroup<T> group() const { return {static_cast<const T*>(memory_.get()), sums_}; }

 private:
  std::unique_ptr<void, FreeAligned> memory_;
  T* sums_;
};

template <class T>
void search(const BinarySearchCall& call, int path_index, std::int64_t num_threads) {
  const BinaryPath<T> path = path_of<T>(path_index);
  double codes = 0;
  for (std::int64_t shape = 0; shape < call.num_shapes; ++shape) codes += static_cast<double>(call.num_offsets[shape]);
  if (call.shapes != nullptr) codes /= static_cast<double>(call.num_shapes);
  const double priced = codes * static_cast<double>(call.num_levels) + 4 * static_cast<double>(call.num_columns);
  const double work = priced * static_cast<double>(call.num_factors);
  for_tiles(call.num_rows, path.lanes, work, num_threads, path.search_bytes(call), [&](void* scratch, std::int64_t tile) {
    path.search_tile(call, scratch, tile);
  });
}

template <class T>
void code_group(const BinaryGroupCall& call, int path_index, std::int64_t num_threads) {
  const BinaryPath<T> path = path_of<T>(path_index);
  const Packed<T> packed(call.upper, call.upper_stride, call.num_columns, true);
  const double triangle = static_cast<double>(call.num_columns) * static_cast<double>(call.num_columns) / 2;
  const double passes = static_cast<double>(call.num_starts + call.refits * call.table.num_coefficients);
  const std::size_t bytes = path.group_bytes(call);
  for_tiles(call.num_rows, path.lanes, triangle * passes, num_threads, bytes, [&](void* scratch, std::int64_t tile) {
    path.group_tile(call, packed.group(), scratch, tile);
  });
}

template <class T>
void improve_group(const BinarySweepCall& call, int path_index, std::int64_t num_threads) {
  const BinaryPath<T> path = path_of<T>(path_index);
  const Packed<T> packed(call.moment, call.moment_stride, call.num_columns, false);
  const double square = static_cast<double>(call.num_columns) * static_cast<double>(call.num_columns);
  const double work = square * static_cast<double>(call.table.num_coefficients);
  for_tiles(call.num_rows, path.lanes, work, num_threads, path.sweep_bytes(call), [&](void* scratch, std::int64_t tile) {
    path.sweep_tile(call, packed.group(), scratch, tile);
  });
}

template <class T>
void find_nearest(const BinaryNearestCall& call, int path_index, std::int64_t num_threads) {
  const BinaryPath<T> path = path_of<T>(path_index);
  const double work = static_cast<double>(call.num_columns) * static_cast<double>(call.num_levels);
  for_tiles(call.num_rows, path.lanes, work, num_threads, 0, [&](void*, std::int64_t tile) {
    path.nearest_tile(call, tile);
  });
}

// Call `work` with a number of the type that the call has.
template <class Work>
int run(int number_bytes, int path, const Work& work) {
  if (!optgptq_supported(path)) return kUnsupported;
  try {
    if (number_bytes == 4) {
      work(float());
    } else {
      work(double());
    }
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kDone;
}

}  // namespace
}  // namespace optgptq

OPTGPTQ_EXPORT int optgptq_binary_search(
    const optgptq::BinarySearchCall* call, int number_bytes, int path, std::int64_t num_threads) {
  return optgptq::run(number_bytes, path, [&](auto number) {
    optgptq::search<decltype(number)>(*call, path, num_threads);
  });
}

OPTGPTQ_EXPORT int optgptq_binary_group(
    const optgptq::BinaryGroupCall* call, int number_bytes, int path, std::int64_t num_threads) {
  return optgptq::run(number_bytes, path, [&](auto number) {
    optgptq::code_group<decltype(number)>(*call, path, num_threads);
  });
}

OPTGPTQ_EXPORT int optgptq_binary_sweep(
    const optgptq::BinarySweepCall* call, int number_bytes, int path, std::int64_t num_threads) {
  return optgptq::run(number_bytes, path, [&](auto number) {
    optgptq::improve_group<decltype(number)>(*call, path, num_threads);
  });
}

OPTGPTQ_EXPORT int optgptq_binary_nearest(
    const optgptq::BinaryNearestCall* call, int number_bytes, int path, std::int64_t num_threads) {
  return optgptq::run(number_bytes, path, [&](auto number) {
    optgptq::find_nearest<decltype(number)>(*call, path, num_threads);
  });
}
