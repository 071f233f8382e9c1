// Causal attention over whole sequences of bfloat16 numbers.
#pragma once

#include <cstdint>

#include "bfloat16_pairs.hpp"

namespace optgptq {

// [B, heads, S, D]; the numbers of a head are side by side, all else is any number of numbers apart.
struct HeadNumbers {
  const std::uint16_t* numbers;
  std::int64_t sequence_stride, head_stride, token_stride;
};

struct CausalCall {
  HeadNumbers query, key, value;
  const std::int64_t* positions;  // [B, Q], in order: tokens whose queries count; null: all of them
  std::uint16_t* output;          // [B, Q, heads, E], without gaps
  std::int64_t num_sequences, num_heads, num_kv_heads, num_tokens, num_queries;
  std::int64_t head_dim, value_dim;  // D of queries and keys, E of values
  double scale;                      // above zero
};

// `head_dim` and `value_dim` are multiples of 16. The same bits for any number of threads and of sequences. Returns false where the
// processor lacks the instruction.
bool causal_attention_bfloat16(const CausalCall& call, PairWay way, std::int64_t num_threads);

}  // namespace optgptq
