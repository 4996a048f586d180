// Attention of some queries over int8 keys and values, as a context keeps them: one pass over the keys; a value is read
// only where it can matter.
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

namespace herd {
namespace {

constexpr int64_t PIECE = 256;  // tokens whose logits are in cache

float from_half(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) return (sign ? -1 : 1) * std::ldexp((float)fraction, -24);
  const uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Queries {
  int64_t R, d;
  Buffer<int8_t> high, low;     // [R, d]
  Buffer<float> scale;          // [R], of high
  Buffer<int32_t> high_excess;  // [R], 128 times the sum of a row
  Buffer<int32_t> low_excess;
  Queries(int64_t R, int64_t d) : R(R), d(d), high(R * d), low(R * d), scale(R), high_excess(R), low_excess(R) {}
};

void split(const float* q, Queries& to) {
  for (int64_t r = 0; r < to.R; r++, q += to.d) {
    float most = 0;
    for (int64_t i = 0; i < to.d; i++) most = std::fabs(q[i]) > most ? std::fabs(q[i]) : most;
    const float inverse = most > 0 ? 127 / most : 0;
    int32_t high_sum = 0, low_sum = 0;
    for (int64_t i = 0; i < to.d; i++) {
      const float x = q[i] * inverse, high = std::rint(x), low = std::rint((x - high) * 254);
      to.high.at[r * to.d + i] = (int8_t)high;
      to.low.at[r * to.d + i] = (int8_t)low;
      high_sum += (int32_t)high;
      low_sum += (int32_t)low;
    }
    to.scale.at[r] = most / 127;
    to.high_excess.at[r] = 128 * high_sum;
    to.low_excess.at[r] = 128 * low_sum;
  }
}

// Logits of 16 tokens: keys transposed to four dimensions of 16 tokens at a time. to [R, PIECE].
void logits16(const Queries& q, const int8_t* keys, const float* key_scale, float* to) {
  const Float16 scale = load(key_scale);
  const int64_t quads = q.d / 4;
  alignas(64) uint8_t columns[256 * 64];
  transpose_keys(keys, q.d, columns);
  for (int64_t r = 0; r < q.R; r++) {
    Int16 high = zero_int(), low = zero_int();
    for (int64_t i = 0; i < quads; i++) {
      int32_t high4, low4;
      std::memcpy(&high4, q.high.at + r * q.d + 4 * i, 4);
      std::memcpy(&low4, q.low.at + r * q.d + 4 * i, 4);
      const Bytes column = load_bytes(columns + 64 * i);
      high = dot(high, column, high4);
      low = dot(low, column, low4);
    }
    const Float16 coarse = multiply(times(to_float(subtract(high, q.high_excess.at[r])), q.scale.at[r]), scale);
    const Float16 fine = times(to_float(subtract(low, q.low_excess.at[r])), q.scale.at[r] / 254);
    store(to + r * PIECE, fma(fine, scale, coarse));
  }
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
  void add(State& other) {
    for (int64_t r = 0; r < R; r++) {
      const float to = most.at[r] > other.most.at[r] ? most.at[r] : other.most.at[r];
      rescale(r, to);
      other.rescale(r, to);
      sum.at[r] += other.sum.at[r];
      left_out.at[r] += other.left_out.at[r];
      for (int64_t i = 0; i < d; i++) out.at[r * d + i] += other.out.at[r * d + i];
    }
  }
};

// Logits of one piece become weights; `cut`: the weight below which a query needs no value.
void weights(State& state, float* logits, int64_t count, float log_cut, const State& before, float* cut) {
  const int64_t padded = (count + 15) / 16 * 16;
  for (int64_t r = 0; r < state.R; r++) {
    float* row = logits + r * PIECE;
    for (int64_t n = count; n < padded; n++) row[n] = LOWEST;
    const float most = largest(row, padded);
    if (most > state.most.at[r]) state.rescale(r, most);
    state.sum.at[r] += exponentials(row, padded, state.most.at[r]);
    // All that is known so far: this part and those before it.
    const float now = state.log_sum(r), then = before.log_sum(r), top = now > then ? now : then;
    const float both = top + std::log(std::exp(now - top) + std::exp(then - top));
    cut[r] = std::exp(both + log_cut - state.most.at[r]);
  }
}

void add_values(State& state, const float* weight, const float* cut, const int8_t* values, const uint16_t* scale,
                int64_t count) {
  const int64_t d = state.d;
  float wide[256];
  for (int64_t n = 0; n < count; n++) {
    bool ready = false;
    for (int64_t r = 0; r < state.R; r++) {
      const float w = weight[r * PIECE + n];
      if (w < cut[r]) {
        state.left_out.at[r] += w;
        continue;
      }
      if (!ready) {
        const float s = from_half(scale[n]);
        for (int64_t i = 0; i < d; i++) wide[i] = s * (float)values[n * d + i];
        ready = true;
      }
      for (int64_t i = 0; i < d; i++) state.out.at[r * d + i] += w * wide[i];
    }
  }
}

void one_part(const Queries& q, const Tokens& t, float log_cut, const State& before, State& state, float* logits,
               float* cut) {
  alignas(64) float key_scale[PIECE];
  alignas(64) int8_t last[16 * 256];
  for (int64_t n = 0; n < t.count; n += PIECE) {
    const int64_t count = least(PIECE, t.count - n);
    for (int64_t i = 0; i < PIECE; i++) key_scale[i] = i < count ? from_half(t.key_scale[n + i]) : 0;
    for (int64_t i = 0; i < count; i += 16) {
      const int8_t* keys = t.keys + (n + i) * q.d;
      if (count - i < 16) {  // do not read past the end
        std::memset(last, 0, sizeof last);
        std::memcpy(last, keys, (count - i) * q.d);
        keys = last;
      }
      logits16(q, keys, key_scale + i, logits + i);
    }
    weights(state, logits, count, log_cut, before, cut);
    add_values(state, logits, cut, t.values + n * q.d, t.value_scale + n, count);
  }
}

void attend(const float* q, int64_t G, int64_t R, int64_t d, const Tokens* tokens, int64_t K, float missed,
            int64_t threads, float* out, float* lse, float* part_lse, float* left_out) {
  int64_t total = 0;
  for (int64_t k = 0; k < K; k++) total += tokens[k * G].count;
  const float log_cut = std::log(missed / (float)(total > 0 ? total : 1));
  for (int64_t g = 0; g < G; g++) {
    Queries queries(R, d);
    split(q + g * R * d, queries);
    State all(R, d);
#pragma omp parallel num_threads(threads)
    {
      State mine(R, d), part(R, d);
      Buffer<float> logits(R * PIECE), cut(R);
#pragma omp for schedule(dynamic, 1)
      for (int64_t k = 0; k < K; k++) {
        part.clear();
        one_part(queries, tokens[k * G + g], log_cut, mine, part, logits.at, cut.at);
        for (int64_t r = 0; r < R; r++) part_lse[(k * G + g) * R + r] = part.log_sum(r);
        mine.add(part);
      }
#pragma omp critical
      all.add(mine);
    }
    for (int64_t r = 0; r < R; r++) {
      lse[g * R + r] = all.log_sum(r);
      left_out[g * R + r] = all.left_out.at[r] / all.sum.at[r];
      for (int64_t i = 0; i < d; i++) out[(g * R + r) * d + i] = all.out.at[r * d + i] / all.sum.at[r];
    }
  }
}

}  // namespace

extern const Attend HERD_NAME(attend);
const Attend HERD_NAME(attend) = attend;

}  // namespace herd
