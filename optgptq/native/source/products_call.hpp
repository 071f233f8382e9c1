// What all products with weights in codes do around the loops of an instruction set: work space and threads.
#pragma once

#include "processor.hpp"
#include "products.hpp"
#include "threads.hpp"

namespace optgptq {

constexpr int kDone = 0, kNoMemory = 1;
constexpr int kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3;
// Products of two numbers below which a second thread costs more than it does.
constexpr std::int64_t kWorkPerThread = 1 << 19;
// Row tiles that a thread takes at a time.
constexpr std::int64_t kTilesPerItem = 8;
// Tokens from which quantizing them is shared.
constexpr std::int64_t kTokensPerItem = 16;

// One product; `Codes` says at least how many rows, blocks and groups there are.
template <class Codes>
struct ProductCall {
  ProductRows rows;
  Codes weight;
  ProductOutput output;
  std::int64_t num_tokens, is_exact;
};

template <class Call>
std::int64_t num_workers(const Call& call, std::int64_t num_items, std::int64_t num_threads) {
  const std::int64_t work = call.num_tokens * call.weight.num_rows * call.rows.num_columns;
  const std::int64_t worth = work / kWorkPerThread + 1, most = num_items < num_threads ? num_items : num_threads;
  return worth < most ? worth : most;
}

// Call `work(worker, begin, end)` for ranges of row tiles.
template <class Call, class Work>
void share_tiles(const Call& call, std::int64_t num_threads, const Work& work) {
  const std::int64_t num_tiles = (call.weight.num_rows + kTileRows - 1) / kTileRows;
  const std::int64_t num_items = (num_tiles + kTilesPerItem - 1) / kTilesPerItem;
  share_out(num_items, num_workers(call, num_items, num_threads), [&](std::int64_t worker, std::int64_t item) {
    const std::int64_t begin = item * kTilesPerItem, end = begin + kTilesPerItem;
    work(worker, begin, end < num_tiles ? end : num_tiles);
  });
}

// Call `work(token)` for all tokens.
template <class Call, class Work>
void share_tokens(const Call& call, std::int64_t num_threads, const Work& work) {
  const std::int64_t num_items = (call.num_tokens + kTokensPerItem - 1) / kTokensPerItem;
  const std::int64_t most = num_items < num_threads ? num_items : num_threads;
  share_out(num_items, most, [&](std::int64_t, std::int64_t item) {
    const std::int64_t begin = item * kTokensPerItem, end = begin + kTokensPerItem;
    for (std::int64_t token = begin; token < end && token < call.num_tokens; ++token) work(token);
  });
}

// `path` prepares activations, `exact` multiplies.
template <class Call, class Exact>
void multiply_exact(const Call& call, const ProductPath& path, const Exact& exact, std::int64_t num_threads) {
  const std::int64_t columns = call.weight.num_blocks * kBlockColumns;
  const auto memory = aligned_memory(static_cast<std::size_t>(call.num_tokens * columns) * sizeof(float));
  float* rows = static_cast<float*>(memory.get());
  share_tokens(call, num_threads, [&](std::int64_t token) {
    path.widen(call.rows, token, rows + token * columns, call.weight.num_blocks);
  });
  const ExactInputs inputs{rows, call.num_tokens, bytes_ahead()};
  share_tiles(call, num_threads, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    exact(call.weight, inputs, call.output, begin, end);
  });
}

// The same with activations in 8 bits; `multiply` does so.
template <class Call, class Multiply>
void multiply_quantized(const Call& call, const ProductPath& path, const Multiply& multiply,
                        std::int64_t num_threads) {
  const std::int64_t blocks = call.weight.num_blocks, groups = call.weight.num_groups, tokens = call.num_tokens;
  const std::int64_t columns = blocks * kBlockColumns, row_bytes = columns * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t widened = tokens < kTokensPerItem ? 1 : tokens;
  const auto memory = aligned_memory(static_cast<std::size_t>(tokens * (columns + 4 * (blocks + groups)) + 64));
  const auto row_memory = aligned_memory(static_cast<std::size_t>(widened * row_bytes));
  std::int8_t* codes = static_cast<std::int8_t*>(memory.get());
  float* scales = reinterpret_cast<float*>(codes + tokens * columns);
  float* sums = scales + tokens * blocks;
  float* rows = static_cast<float*>(row_memory.get());
  const ProductInputs inputs{codes, scales, sums, tokens, blocks, groups, bytes_ahead()};
  share_tokens(call, num_threads, [&](std::int64_t token) {
    path.quantize(call.rows, token, rows + (widened == 1 ? 0 : token * columns), inputs);
  });
  const std::int64_t space = tokens > kFewTokens ? kResultsSpace : 0;
  const auto results = aligned_memory(static_cast<std::size_t>(space * num_threads) * sizeof(float) + 64);
  share_tiles(call, num_threads, [&](std::int64_t worker, std::int64_t begin, std::int64_t end) {
    multiply(call.weight, inputs, call.output, begin, end, static_cast<float*>(results.get()) + worker * space);
  });
}

// The path of that number, one of those that the processor has.
ProductPath product_path_of(int path);

}  // namespace optgptq
