// Attention of some queries over keys and values in 8 or 4 bits, as a context keeps them: one pass over the keys; a value
// is read only where it can matter. BITS: of a key or value.
//
// A token is left out if its share of the softmax is below `missed / tokens`, whatever is still to come: shares only
// shrink. So all that is left out stays below `missed`, and how much it was is known, because every logit is.
// Queries are split into two int8 numbers each, q = scale * (high + low / 254), so that a logit is exact to 2e-5 of
// |q| |k|, less than float16 scales of keys are.
#include <cmath>

#include "buffer.h"
#include "levels.h"
#include "simd.h"
#include "vector_math.h"
#include "whole.h"

namespace herd {
namespace {

constexpr int64_t PIECE = 256;  // tokens whose logits are in cache
constexpr int64_t AHEAD = 256;  // how many tokens before their use keys are fetched

float from_half(uint16_t h) {  // finite numbers; without branches, so that the compiler makes vectors of it
  const uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  return (h & 0x8000 ? -0x1p112f : 0x1p112f) * x;
}

struct Queries {
  int64_t R, d;
  Buffer<int8_t> high, low;           // [R, d]
  Buffer<float> scale;                // [R], of high
  Buffer<int32_t> high_sum, low_sum;  // [R], of a row
  Queries(int64_t R, int64_t d) : R(R), d(d), high(R * d), low(R * d), scale(R), high_sum(R), low_sum(R) {}
};

void split(const float* q, Queries& to) {
  for (int64_t r = 0; r < to.R; r++, q += to.d) {
    const Steps steps(largest_magnitude(q, to.d));
    int32_t high_sum = 0, low_sum = 0;
    for (int64_t i = 0; i < to.d; i++) {
      const float high = steps.finite ? steps.whole(q[i]) : 0, low = steps.finite ? steps.rest(q[i]) : 0;
      to.high.at[r * to.d + i] = (int8_t)high;
      to.low.at[r * to.d + i] = (int8_t)low;
      high_sum += (int32_t)high;
      low_sum += (int32_t)low;
    }
    to.scale.at[r] = steps.step;
    to.high_sum.at[r] = high_sum;
    to.low_sum.at[r] = low_sum;
  }
}

// Adds the products of four dimensions, from i on, of 16 tokens and ROWS queries from r on.
template <int ROWS>
inline void add_products(const Queries& q, int64_t r, int64_t i, Bytes column, Int16* high, Int16* low) {
  for (int j = 0; j < ROWS; j++) {
    int32_t high4, low4;
    std::memcpy(&high4, q.high.at + (r + j) * q.d + i, 4);
    std::memcpy(&low4, q.low.at + (r + j) * q.d + i, 4);
    high[j] = dot(high[j], column, high4);
    low[j] = dot(low[j], column, low4);
  }
}

// Logits of 16 tokens and ROWS queries from r on: several at once, because each sum waits for its last step.
template <int BITS, int ROWS>
void some_logits(const Queries& q, int64_t r, const uint8_t* columns, Float16 scale, float* to) {
  constexpr int32_t ADDED = BITS == 8 ? 128 : 8;  // to every key
  Int16 high[ROWS], low[ROWS];
  for (int j = 0; j < ROWS; j++) high[j] = low[j] = zero_int();
  const int64_t row = q.d * BITS / 8;
  for (int64_t i = 0; i < row; i += 4) {
    const Bytes column = load_bytes(columns + 16 * i);
    add_products<ROWS>(q, r, i, BITS == 8 ? column : low_nibbles(column), high, low);
    if (BITS == 4) add_products<ROWS>(q, r, row + i, high_nibbles(column), high, low);
  }
  for (int j = 0; j < ROWS; j++) {
    const float q_scale = q.scale.at[r + j];
    const Float16 coarse = times(to_float(subtract(high[j], ADDED * q.high_sum.at[r + j])), q_scale);
    const Float16 fine = times(to_float(subtract(low[j], ADDED * q.low_sum.at[r + j])), q_scale / 254);
    store(to + j * PIECE, fma(fine, scale, multiply(coarse, scale)));
  }
}

// Logits of 16 tokens and R queries from `first` on: keys are transposed to four bytes of 16 tokens at a time.
// to [R, PIECE].
template <int BITS>
void logits16(const Queries& q, int64_t first, int64_t R, const uint8_t* keys, const float* key_scale, float* to) {
  const Float16 scale = load(key_scale);
  const int64_t row = q.d * BITS / 8;
  alignas(64) uint8_t columns[256 * 64];
  // Into the second cache: the first has no room for so many loads under way.
  for (int64_t i = 0; i < 16 * row; i += 64) __builtin_prefetch(keys + AHEAD * row + i, 0, 2);
  transpose_keys(keys, row, BITS == 8 ? 128 : 0, columns);
  int64_t r = 0;
  for (; r + 3 <= R; r += 3) some_logits<BITS, 3>(q, first + r, columns, scale, to + r * PIECE);
  for (; r < R; r++) some_logits<BITS, 1>(q, first + r, columns, scale, to + r * PIECE);
}

// Running softmax of every query: the largest logit, the sum of weights relative to it, the sum of values.
struct State {
  int64_t R, d;
  Buffer<float> most, sum, left_out;  // [R]
  Buffer<float> out;                  // [R, d]
  State(int64_t R, int64_t d) : R(R), d(d), most(R), sum(R), left_out(R), out(R * d) { clear(); }
  void clear() {
    for (int64_t r = 0; r < R; r++) most.at[r] = LOWEST, sum.at[r] = left_out.at[r] = 0;
    for (int64_t i = 0; i < R * d; i++) out.at[i] = 0;
  }
  float log_sum(int64_t r) const { return sum.at[r] > 0 ? most.at[r] + std::log(sum.at[r]) : LOWEST; }
  void rescale(int64_t r, float to) {
    const float factor = std::exp(most.at[r] - to);
    most.at[r] = to;
    sum.at[r] *= factor;
    left_out.at[r] *= factor;
    for (int64_t i = 0; i < d; i++) out.at[r * d + i] *= factor;
  }
  // Adds other queries' results to those from `first` on.
  void add(State& other, int64_t first) {
    for (int64_t r = 0; r < other.R; r++) {
      const int64_t own = first + r;
      const float to = most.at[own] > other.most.at[r] ? most.at[own] : other.most.at[r];
      rescale(own, to);
      other.rescale(r, to);
      sum.at[own] += other.sum.at[r];
      left_out.at[own] += other.left_out.at[r];
      for (int64_t i = 0; i < d; i++) out.at[own * d + i] += other.out.at[r * d + i];
    }
  }
};

// Logits of one piece become weights; `cut`: the weight below which a query needs no value; `outside`: the weights known
// beside this part. Returns how many queries need any of the piece, and which; for the others all of it is left out.
int64_t weights(State& state, float* logits, int64_t count, float share, const float* before, float* outside,
                float* cut, int64_t* needing) {
  int64_t need = 0;
  const int64_t padded = (count + 15) / 16 * 16;
  for (int64_t r = 0; r < state.R; r++) {
    float* row = logits + r * PIECE;
    for (int64_t n = count; n < padded; n++) row[n] = LOWEST;
    const float most = largest(row, padded);
    if (most > state.most.at[r]) {
      state.rescale(r, most);
      outside[r] = std::exp(before[r] - most);
    }
    const float sum = exponentials(row, padded, state.most.at[r]);
    state.sum.at[r] += sum;
    // All that is known so far: this part and those before it.
    cut[r] = share * (state.sum.at[r] + outside[r]);
    if (exponential(most - state.most.at[r]) < cut[r])
      state.left_out.at[r] += sum;
    else
      needing[need++] = r;
  }
  return need;
}

// out [d] += factor times one token's value.
template <int BITS>
inline void add_value(float* __restrict out, float factor, const uint8_t* __restrict value, int64_t d) {
  if (BITS == 8) {
    for (int64_t j = 0; j < d; j++) out[j] += factor * (float)(int8_t)value[j];
  } else {
    for (int64_t j = 0; j < d / 2; j++) out[j] += factor * (float)((value[j] & 15) - 8);
    for (int64_t j = 0; j < d / 2; j++) out[d / 2 + j] += factor * (float)((value[j] >> 4) - 8);
  }
}

template <int BITS>
void add_values(State& state, const float* weight, const float* cut, const int64_t* needing, int64_t need,
                const uint8_t* values, const uint16_t* scale, int64_t count) {
  const int64_t d = state.d;
  for (int64_t i = 0; i < need; i++) {
    const int64_t r = needing[i];
    for (int64_t first = 0; first < count; first += 16) {
      const float* block = weight + r * PIECE + first;
      if (largest(block, 16) < cut[r]) {
        for (int64_t n = 0; n < 16; n++) state.left_out.at[r] += block[n];
        continue;
      }
      for (int64_t n = first; n < least(first + 16, count); n++) {
        const float w = weight[r * PIECE + n];
        if (w < cut[r]) {
          state.left_out.at[r] += w;
          continue;
        }
        add_value<BITS>(state.out.at + r * d, w * from_half(scale[n]), values + n * d * BITS / 8, d);
      }
    }
  }
}

// before: for each query from `first` on, the log of a sum of weights that are not of this part. Values of tokens that
// have a smaller share of the softmax than `share` are left out.
template <int BITS>
void one_part(const Queries& q, int64_t first, const Tokens& t, float share, const float* before, State& state,
              float* logits, float* outside, float* cut, int64_t* needing) {
  alignas(64) float key_scale[PIECE];
  alignas(64) uint8_t last[16 * 256];
  const int64_t row = q.d * BITS / 8;
  for (int64_t n = 0; n < t.count; n += PIECE) {
    const int64_t count = least(PIECE, t.count - n);
    for (int64_t i = 0; i < count; i++) key_scale[i] = from_half(t.key_scale[n + i]);
    for (int64_t i = count; i < PIECE; i++) key_scale[i] = 0;
    for (int64_t i = 0; i < count; i += 16) {
      const uint8_t* keys = t.keys + (n + i) * row;
      if (count - i < 16) {  // do not read past the end
        std::memset(last, 0, sizeof last);
        std::memcpy(last, keys, (count - i) * row);
        keys = last;
      }
      logits16<BITS>(q, first, state.R, keys, key_scale + i, logits + i);
    }
    const int64_t need = weights(state, logits, count, share, before, outside, cut, needing);
    add_values<BITS>(state, logits, cut, needing, need, t.values + n * row, t.value_scale + n, count);
  }
}

void attend(const float* q, int64_t G, int64_t R, int64_t d, const Tokens* tokens, int64_t K, float missed,
            const float* elsewhere, int64_t threads, float* out, float* lse, float* part_lse, float* left_out) {
  int64_t total = 0;
  for (int64_t k = 0; k < K; k++) total += tokens[k * G].count;
  const float share = missed / (float)(total > 0 ? total : 1);
  Queries queries(G * R, d);
  split(q, queries);
  State all(G * R, d);
  Buffer<float> known(G * R);  // the largest log-sum that any thread has seen: what one finds spares the others values
  for (int64_t r = 0; r < G * R; r++) known.at[r] = LOWEST;
#pragma omp parallel num_threads(threads)
  {
    State mine(G * R, d), part(R, d);
    Buffer<float> logits(R * PIECE), cut(R), before(R), outside(R);
    Buffer<int64_t> needing(R);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < K * G; item++) {
      const int64_t first = item % G * R;
      part.clear();
#pragma omp critical(known)
      for (int64_t r = 0; r < R; r++) before.at[r] = log_add(known.at[first + r], elsewhere[first + r]);
      const auto attend_part = tokens[item].bits == 8 ? one_part<8> : one_part<4>;
      attend_part(queries, first, tokens[item], share, before.at, part, logits.at, outside.at, cut.at, needing.at);
      for (int64_t r = 0; r < R; r++) part_lse[item * R + r] = part.log_sum(r);
      mine.add(part, first);
#pragma omp critical(known)
      for (int64_t r = first; r < first + R; r++)
        known.at[r] = mine.log_sum(r) > known.at[r] ? mine.log_sum(r) : known.at[r];
    }
#pragma omp critical
    all.add(mine, 0);
  }
  for (int64_t r = 0; r < G * R; r++) {
    lse[r] = all.log_sum(r);
    left_out[r] = all.left_out.at[r] / (all.sum.at[r] + std::exp(elsewhere[r] - all.most.at[r]));
    for (int64_t i = 0; i < d; i++) out[r * d + i] = all.out.at[r * d + i] / all.sum.at[r];
  }
}

}  // namespace

extern const Attend HERD_NAME(attend);
const Attend HERD_NAME(attend) = attend;

}  // namespace herd
