// Attention of the query heads of one key/value head, for some tokens: keys in tiles, a running softmax for each row.
// Included once by each instruction set.
#pragma once

#include "paged_attention.hpp"
#include "paged_attention_place.hpp"
#include "paged_attention_products.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

// One query head of one token.
struct Row {
  const float* query;
  float* output;            // sums of weighted values, in the work space
  FloatVector total;        // sums of weights, lane by lane
  float largest;            // score so far
  float slope;              // of ALiBi
  std::int64_t position;    // of the query
  std::int64_t begin, end;  // keys that it sees in the present tile
};

// Rows that share every number of keys and values that is read.
constexpr int kRowsTogether = 4;
// Rows from which on it is worth to bring a tile into one piece of floats first.
constexpr std::int64_t kRowsOfCopies = 8;

inline std::int64_t padded_dim(std::int64_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

inline std::int64_t copy_size(const PagedCall& call, std::int64_t num_rows) {
  return num_rows < kRowsOfCopies ? 0 : 2 * kKeys * padded_dim(call.pages.head_dim);
}

inline std::size_t scratch_bytes(const PagedCall& call, std::int64_t num_rows) {
  const std::int64_t numbers =
      kRowsTogether * kKeys + num_rows * padded_dim(call.pages.head_dim) + copy_size(call, num_rows);
  return static_cast<std::size_t>(num_rows) * sizeof(Row) + static_cast<std::size_t>(numbers) * 4;
}

OPTGPTQ_INLINE FloatVector rounded_bias(FloatVector position, float slope) {
  return rounded_to_bfloat16(rounded_to_bfloat16(position) * rounded_to_bfloat16(every(slope)));
}

// What ALiBi adds at `position` less what it adds at the query's own: softmax lets the difference drop out, and with
// the whole bias of a far position scores would lose digits.
OPTGPTQ_INLINE FloatVector bias_of(const ScoreRule& rule, const Row& row, FloatVector position) {
  const auto own = static_cast<float>(row.position);
  if (rule.round_alibi != 0) return rounded_bias(position, row.slope) - rounded_bias(every(own), row.slope);
  return (position - own) * row.slope;
}

OPTGPTQ_INLINE FloatVector ruled(const ScoreRule& rule, const Row& row, FloatVector product, IntVector key) {
  FloatVector score = product * static_cast<float>(rule.scale);
  if (rule.softcap > 0.0) {
    const auto cap = static_cast<float>(rule.softcap);
    score = tangent(score / cap) * cap;
  }
  if (rule.slopes == nullptr) return score;
  const FloatVector position = __builtin_convertvector(key, FloatVector);
  return multiply_add(bias_of(rule, row, position), every(static_cast<float>(rule.alibi_scale)), score);
}

// Turn products into scores and those into weights; keys of these vectors that the row does not see get none.
// One function for every number of rows: the same bits, whichever rows are worked on together.
__attribute__((noinline)) void weigh(
    const ScoreRule& rule, Row& row, std::int64_t first_key, std::int64_t padded, float* scores) {
  const FloatVector lowest = every(-__builtin_inff());
  const auto seen_begin = static_cast<std::int32_t>(row.begin), seen_end = static_cast<std::int32_t>(row.end);
  const std::int64_t begin = row.begin / kLanes, end = (row.end + kLanes - 1) / kLanes;
  IntVector lane;
  for (int index = 0; index < kLanes; ++index) lane[index] = index;
  FloatVector top = lowest;
  for (std::int64_t vector = begin; vector < end; ++vector) {
    const IntVector key = lane + static_cast<std::int32_t>(vector * kLanes);
    float* place = scores + vector * kLanes;
    FloatVector score = ruled(rule, row, load_numbers(place), key + static_cast<std::int32_t>(first_key));
    score = (key >= seen_begin) & (key < seen_end) ? score : lowest;
    top = larger(top, score);
    __builtin_memcpy(place, &score, sizeof score);
  }
  const float highest = largest_lane(top);
  const float largest = highest > row.largest ? highest : row.largest;
  // Where all scores so far are minus infinity, their weights are zero.
  const float base = largest == -__builtin_inff() ? 0.0f : largest;
  if (largest != row.largest) {
    const FloatVector factor = exponential(every(row.largest - base));
    row.total *= factor;
    for (std::int64_t feature = 0; feature < padded; feature += kLanes) {
      const FloatVector sum = load_numbers(row.output + feature) * factor;
      __builtin_memcpy(row.output + feature, &sum, sizeof sum);
    }
    row.largest = largest;
  }
  for (std::int64_t vector = begin; vector < end; ++vector) {
    float* place = scores + vector * kLanes;
    const FloatVector weight = exponential(load_numbers(place) - base);
    row.total += weight;
    __builtin_memcpy(place, &weight, sizeof weight);
  }
}

// `M` rows in one tile. Rows see different keys near their own positions and where a window begins: these are added to
// each row alone, in the order of keys, so nothing that a row does not see is multiplied even by zero.
template <class N, int M>
void attend_rows(
    const PagedCall& call, const TileNumbers<N>& tile, Row* rows, std::int64_t first_key, float* weights) {
  std::int64_t first = kKeys, last = 0, shared_begin = 0, shared_end = kKeys;
  const float* query[M];
  float* output[M];
  for (int m = 0; m < M; ++m) {
    query[m] = rows[m].query;
    output[m] = rows[m].output;
    shared_begin = rows[m].begin > shared_begin ? rows[m].begin : shared_begin;
    shared_end = rows[m].end < shared_end ? rows[m].end : shared_end;
    if (rows[m].begin == rows[m].end) continue;
    first = rows[m].begin < first ? rows[m].begin : first;
    last = rows[m].end > last ? rows[m].end : last;
  }
  if (first >= last) return;
  score<N, M>(query, tile, first / kLanes, (last + kLanes - 1) / kLanes, weights);
  for (int m = 0; m < M; ++m) {
    if (rows[m].begin == rows[m].end) continue;
    weigh(call.rule, rows[m], first_key, padded_dim(tile.head_dim), weights + m * kKeys);
  }
  if (shared_begin >= shared_end) shared_begin = shared_end = kKeys;
  for (int m = 0; M > 1 && m < M; ++m) {
    const std::int64_t stop = rows[m].end < shared_begin ? rows[m].end : shared_begin;
    add_values<N, 1>(output + m, weights + m * kKeys, tile, rows[m].begin, stop);
  }
  add_values<N, M>(output, weights, tile, shared_begin, shared_end);
  for (int m = 0; M > 1 && m < M; ++m) {
    add_values<N, 1>(output + m, weights + m * kKeys, tile, shared_end, rows[m].end);
  }
}

// Set what each row sees in the tile; return the first key that any row sees and the one after the last.
inline void look_at_tile(
    const PagedCall& call, Row* rows, std::int64_t num_rows, std::int64_t first_key, std::int64_t seen[2]) {
  seen[0] = kKeys;
  seen[1] = 0;
  for (std::int64_t index = 0; index < num_rows; ++index) {
    Row& row = rows[index];
    const std::int64_t window = call.rule.window;
    const std::int64_t begin = window > 0 ? row.position - window + 1 - first_key : 0;
    const std::int64_t end = row.position + 1 - first_key;
    row.end = end < 0 ? 0 : end < kKeys ? end : kKeys;
    row.begin = begin < 0 ? 0 : begin < row.end ? begin : row.end;
    if (row.begin == row.end) continue;
    seen[0] = row.begin < seen[0] ? row.begin : seen[0];
    seen[1] = row.end > seen[1] ? row.end : seen[1];
  }
}

inline void begin_rows(const PagedCall& call, const PagedItem& item, Row* rows, float* sums) {
  const std::int64_t group_size = call.num_heads / call.pages.num_kv_heads;
  const std::int64_t padded = padded_dim(call.pages.head_dim);
  const std::int64_t start = call.sequences.query_start[item.sequence];
  const std::int64_t num_new = call.sequences.query_start[item.sequence + 1] - start;
  const std::int64_t before = call.sequences.context[item.sequence] - num_new;
  for (std::int64_t token = 0; token < item.num_tokens; ++token) {
    for (std::int64_t member = 0; member < group_size; ++member, ++rows, sums += padded) {
      const std::int64_t head = item.kv_head * group_size + member;
      const std::int64_t place = (start + item.first + token) * call.token_stride + head * call.head_stride;
      rows->query = call.query + place;
      rows->output = sums;
      rows->position = before + item.first + token;
      rows->slope = call.rule.slopes == nullptr ? 0.0f : call.rule.slopes[head];
      rows->largest = -__builtin_inff();
      rows->total = FloatVector{};
      if (call.rule.sinks != nullptr) {
        // A sink is a key at position 0, without a value.
        const float bias = bias_of(call.rule, *rows, FloatVector{})[0] * static_cast<float>(call.rule.alibi_scale);
        rows->largest = call.rule.sinks[head] + bias;
        rows->total[0] = 1.0f;
      }
      for (std::int64_t feature = 0; feature < padded; ++feature) sums[feature] = 0.0f;
    }
  }
}

inline void write_rows(const PagedCall& call, const PagedItem& item, const Row* rows) {
  const std::int64_t group_size = call.num_heads / call.pages.num_kv_heads, head_dim = call.pages.head_dim;
  const std::int64_t start = call.sequences.query_start[item.sequence] + item.first;
  for (std::int64_t token = 0; token < item.num_tokens; ++token) {
    float* to = call.output + ((start + token) * call.num_heads + item.kv_head * group_size) * head_dim;
    for (std::int64_t member = 0; member < group_size; ++member, ++rows, to += head_dim) {
      const float total = sum_of_lanes(rows->total);
      for (std::int64_t feature = 0; feature < head_dim; ++feature) to[feature] = rows->output[feature] / total;
    }
  }
}

template <class N>
void attend_tile(
    const PagedCall& call, const TileNumbers<N>& tile, Row* rows, std::int64_t num_rows, std::int64_t first_key,
    float* weights) {
  std::int64_t row = 0;
  for (; row + 4 <= num_rows; row += 4) attend_rows<N, 4>(call, tile, rows + row, first_key, weights);
  if (row + 2 <= num_rows) {
    attend_rows<N, 2>(call, tile, rows + row, first_key, weights);
    row += 2;
  }
  if (row < num_rows) attend_rows<N, 1>(call, tile, rows + row, first_key, weights);
}

template <class N>
void attend_item(const PagedCall& call, const PagedItem& item, void* scratch) {
  const std::int64_t num_rows = item.num_tokens * (call.num_heads / call.pages.num_kv_heads);
  Row* rows = static_cast<Row*>(scratch);
  float* weights = reinterpret_cast<float*>(rows + num_rows);
  float* copy = weights + kRowsTogether * kKeys;
  begin_rows(call, item, rows, copy + copy_size(call, num_rows));
  const std::int64_t first_seen = call.rule.window > 0 ? rows[0].position - call.rule.window + 1 : 0;
  const std::int64_t last = rows[num_rows - 1].position;
  for (std::int64_t key = first_seen > 0 ? first_seen / kKeys * kKeys : 0; key <= last; key += kKeys) {
    std::int64_t seen[2];
    look_at_tile(call, rows, num_rows, key, seen);
    const TileNumbers<N> tile = find_tile<N>(call, item, key, seen[0], seen[1]);
    if (num_rows >= kRowsOfCopies) {
      attend_tile<float>(call, copy_tile<N>(tile, seen, copy), rows, num_rows, key, weights);
    } else {
      attend_tile<N>(call, tile, rows, num_rows, key, weights);
    }
  }
  write_rows(call, item, rows);
}

inline void attend(const PagedCall& call, const PagedItem& item, void* scratch) {
  switch (call.pages.type) {
    case NumberType::kFloat: return attend_item<float>(call, item, scratch);
    case NumberType::kBFloat16: return attend_item<BFloat16>(call, item, scratch);
    case NumberType::kHalf: return attend_item<Half>(call, item, scratch);
  }
}

}  // namespace
}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
