// Heads of queries, keys and values out of a joint projection for one instruction set: widened, normed, rotated.
#pragma once

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

template <class N>
OPTGPTQ_INLINE void widen(const N* from, float* to, std::int64_t size) {
  for (std::int64_t index = 0; index < size; index += kLanes) {
    store_up_to(to + index, load_up_to(from + index, size - index), size - index);
  }
}

// In the half-split layout, rounded where the operations of torch round.
OPTGPTQ_INLINE void rotate_head(float* head, const float* cosine, const float* sine, std::int64_t half) {
  for (std::int64_t index = 0; index < half; index += kLanes) {
    const std::int64_t count = half - index;
    const FloatVector first = load_up_to(head + index, count), second = load_up_to(head + half + index, count);
    const FloatVector c = load_up_to(cosine + index, count), s = load_up_to(sine + index, count);
    store_up_to(head + index, multiply_add(-second, s, first * c), count);
    store_up_to(head + half + index, multiply_add(first, s, second * c), count);
  }
}

template <class W>
OPTGPTQ_INLINE void norm_head(float* head, const W* weight, std::int64_t size, double epsilon) {
  Squares squares{};
  for (std::int64_t index = 0; index < size; index += kLanes) {
    squares.add(load_up_to(head + index, size - index), index / kLanes);
  }
  const float factor = squares.factor(size, epsilon);
  for (std::int64_t index = 0; index < size; index += kLanes) {
    const std::int64_t count = size - index;
    store_up_to(head + index, load_up_to(head + index, count) * factor * load_up_to(weight + index, count), count);
  }
}

void open_heads(
    const JointCall& call, const void* weight, float* heads, std::int64_t num_heads, std::int64_t token) {
  const JointStep& step = *call.step;
  const std::int64_t head_dim = call.pages.head_dim;
  for (std::int64_t head = 0; head < num_heads; ++head, heads += head_dim) {
    if (weight != nullptr) {
      with_weight<float>(weight, call.weight_type, [&](const auto* numbers) {
        norm_head(heads, numbers, head_dim, call.epsilon);
      });
    }
    if (step.cosine == nullptr) continue;
    rotate_head(heads, step.cosine + token * step.half, step.sine + token * step.half, step.half);
  }
}

template <class N>
OPTGPTQ_INLINE void widen_token(const JointCall& call, std::int64_t token, float* heads, std::int64_t size) {
  widen(static_cast<const N*>(call.joint) + token * call.token_stride, heads, size);
}

void open_token(const JointCall& call, std::int64_t token) {
  const std::int64_t head_dim = call.pages.head_dim, num_kv_heads = call.pages.num_kv_heads;
  const std::int64_t size = (call.num_heads + 2 * num_kv_heads) * head_dim;
  float* heads = call.step->heads + token * size;
  switch (call.type) {
    case NumberType::kFloat: widen_token<float>(call, token, heads, size); break;
    case NumberType::kBFloat16: widen_token<BFloat16>(call, token, heads, size); break;
    case NumberType::kHalf: widen_token<Half>(call, token, heads, size); break;
  }
  open_heads(call, call.query_weight, heads, call.num_heads, token);
  open_heads(call, call.key_weight, heads + call.num_heads * head_dim, num_kv_heads, token);
}

template <class N>
OPTGPTQ_INLINE void narrow_token(const JointCall& call, std::int64_t token) {
  const std::int64_t size = call.num_heads * call.pages.head_dim;
  const float* from = call.step->attended + token * size;
  N* to = static_cast<N*>(call.output) + token * size;
  for (std::int64_t index = 0; index < size; index += kLanes) {
    store_up_to(to + index, load_up_to(from + index, size - index), size - index);
  }
}

void close_token(const JointCall& call, std::int64_t token) {
  switch (call.type) {
    case NumberType::kFloat: return narrow_token<float>(call, token);
    case NumberType::kBFloat16: return narrow_token<BFloat16>(call, token);
    case NumberType::kHalf: return narrow_token<Half>(call, token);
  }
}

}  // namespace

LeavesPath leaves_path() { return {sum_and_norm, gated, open_token, close_token, greatest, draw}; }

}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
