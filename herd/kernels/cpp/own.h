// Attention of a sequence's tokens to its own keys and values, kept in bfloat16 as products (product.h) want weights:
// keys are outputs whose inputs are dimensions, values outputs (dimensions) whose inputs are tokens. Some queries go over
// their keys in spans whose logits stay in cache; softmax is in float32.
#pragma once
#include "product.h"
#include "vector_math.h"

namespace herd {
namespace {

constexpr int64_t SPAN = 512;  // keys whose logits are kept

// Memory is in whole panels of tokens.
inline int64_t whole(int64_t tokens) { return panels(tokens) * PANEL; }

// d numbers in bfloat16, two by two, each two `apart` twos from those before.
inline void put_pairs(const float* x, int64_t d, uint16_t* to, int64_t apart, float scale = 1) {
  alignas(64) uint16_t halves[MOST_DIMENSIONS];
  for (int64_t i = 0; i < d; i += 32) store_halves(halves + i, times(load(x + i), scale), times(load(x + i + 16), scale));
  for (int64_t i = 0; i < d; i += 2) std::memcpy(to + i * apart, halves + i, 4);
}

// Keys and values of one head: keys [capacity / 32, d / 2, 32, 2], then values [d / 32, capacity / 2, 32, 2]. What was
// never written must be finite, because it is multiplied with 0.
struct Memory {
  uint16_t *keys, *values;
  int64_t capacity, d;

  Memory(uint16_t* heads, int64_t g, int64_t tokens, int64_t d)
      : keys(heads + 2 * g * whole(tokens) * d), values(keys + whole(tokens) * d), capacity(whole(tokens)), d(d) {}

  // Keys and values of tokens that follow each other, `stride` numbers apart.
  void put(int64_t token, int64_t tokens, const float* k, const float* v, int64_t stride) {
    for (int64_t t = 0; t < tokens; t++)
      put_pairs(k + t * stride, d, keys + (token + t) / PANEL * PANEL * d + (token + t) % PANEL * 2, PANEL);
    for (int64_t t = 0; t < tokens;) {
      const bool both = (token + t) % 2 == 0 && t + 1 < tokens;  // they share words of memory
      for (int64_t i = 0; i < d; i += PANEL) {
        uint16_t* to = values + i * capacity + (token + t) / 2 * PANEL * 2;
        const float* from = v + t * stride + i;
        if (both)
          for (int64_t j = 0; j < PANEL; j++) to[2 * j] = narrow(from[j]), to[2 * j + 1] = narrow(from[stride + j]);
        else
          for (int64_t j = 0; j < PANEL; j++) to[2 * j + (token + t) % 2] = narrow(from[j]);
      }
      t += 1 + both;
    }
  }
};

// One query: where it is, how many tokens it sees, and where its result goes.
struct Query {
  const float* q;
  int64_t sees;
  float* out;
};

struct Softmax {
  float most, sum;

  // Logits of `span` tokens, of which the first `seen` count, to weights; returns what earlier ones are multiplied with.
  float take(float* logit, int64_t seen, int64_t span, uint16_t* weight) {
    if (seen <= 0) {
      std::memset(weight, 0, span * 2);
      return 1;
    }
    for (int64_t t = seen; t < span; t++) logit[t] = LOWEST;
    const float before = most, here = largest(logit, span);
    most = here > before ? here : before;
    const float factor = std::exp(before - most);
    sum = sum * factor + exponentials(logit, span, most);
    for (int64_t t = 0; t < span; t += 32) store_halves(weight + t, load(logit + t), load(logit + t + 16));
    return factor;
  }
};

// R queries, ordered by how many tokens they see; q is multiplied with `scale`.
template <int R>
void attend_queries(const Memory& memory, const Query* queries, float scale) {
  const int64_t d = memory.d, seen = queries[R - 1].sees;
  alignas(64) float logit[R][SPAN], sums[R * PANEL];
  alignas(64) uint16_t weight[R][SPAN];
  uint16_t q[R * MOST_DIMENSIONS];
  Softmax softmax[R];
  for (int r = 0; r < R; r++) {
    softmax[r] = {LOWEST, 0};
    put_pairs(queries[r].q, d, q + 2 * r, R, scale);
    for (int64_t i = 0; i < d; i++) queries[r].out[i] = 0;
  }
  for (int64_t from = 0; from < seen; from += SPAN) {
    const int64_t span = least(SPAN, whole(seen - from));
    for (int64_t t = 0; t < span; t += PANEL)
      half_sums<R>(memory.keys + (from + t) * d, d / 2, (const uint8_t*)q, &logit[0][t], SPAN);
    float factor[R];
    for (int r = 0; r < R; r++) factor[r] = softmax[r].take(logit[r], queries[r].sees - from, span, weight[r]);
    for (int64_t i = 0; i < d; i += PANEL) {
      const uint16_t* values = memory.values + i * memory.capacity + from * PANEL;
      half_sums<R, 2 * SPAN>(values, span / 2, (const uint8_t*)weight, sums, PANEL);
      for (int r = 0; r < R; r++)
        for (int64_t j = 0; j < PANEL; j++) {
          float& out = queries[r].out[i + j];
          out = out * factor[r] + sums[r * PANEL + j];
        }
    }
  }
  for (int r = 0; r < R; r++)
    for (int64_t i = 0; i < d; i++) queries[r].out[i] /= softmax[r].sum;
}

using AttendQueries = void (*)(const Memory&, const Query*, float);

template <size_t... I>
AttendQueries attend_of(int64_t count, std::index_sequence<I...>) {
  static constexpr AttendQueries table[] = {attend_queries<I + 1>...};
  return table[count - 1];
}

// At most ROWS queries.
inline void attend_own(const Memory& memory, const Query* queries, int64_t count, float scale) {
  attend_of(count, std::make_index_sequence<ROWS>())(memory, queries, scale);
}

}  // namespace
}  // namespace herd
