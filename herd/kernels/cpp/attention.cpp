// Attention of some queries over keys and values in 8 or 4 bits, as a context keeps them: one pass over the keys; a value
// is read only where it can matter. BITS: of a key or value.
//
// Queries are split into two int8 numbers each, q = scale * (high + low / 254), so that a logit is exact to 1.6e-5
// sqrt(d) |q| |k|, less than what float16 scales of keys round. The products of the high numbers come first: with a bound
// on the others they tell how large the logits of a piece are at most.
// A token is left out if its share of the softmax is below `missed / tokens`, whatever is still to come: shares only
// shrink. So all that is left out stays below `missed`. Where that holds for a whole piece by its bound, the piece is
// passed over, and counts as its bound; elsewhere logits are completed, and what is left out is known.
#include <cmath>

#include "buffer.h"
#include "half.h"
#include "levels.h"
#include "simd.h"
#include "vector_math.h"
#include "whole.h"

namespace herd {
namespace {

constexpr int64_t PIECE = 256;  // tokens whose keys and logits are in cache
constexpr int64_t AHEAD = 256;  // how many tokens before their use keys are fetched
// Queries, and blocks of 16 tokens, whose logits are computed together: each sum waits for its last step, so there must be
// many, but not more than there are registers.
constexpr int ROWS = 3;
#if defined(__AVX512VNNI__)
constexpr int BLOCKS = 4;
#else
constexpr int BLOCKS = 1;
#endif

struct Queries {
  int64_t R, d;
  Buffer<int8_t> high, low;           // [R, d]
  Buffer<float> scale, rest;          // [R], of high; the most that is not in high, of all dimensions together
  Buffer<int32_t> high_sum, low_sum;  // [R], of a row
  Queries(int64_t R, int64_t d)
      : R(R), d(d), high(R * d), low(R * d), scale(R), rest(R), high_sum(R), low_sum(R) {}
};

void split(const float* q, Queries& to) {
  for (int64_t r = 0; r < to.R; r++, q += to.d) {
    const Steps steps(largest_magnitude(q, to.d));
    int32_t high_sum = 0, low_sum = 0;
    float rest = 0;
    for (int64_t i = 0; i < to.d; i++) {
      const float high = steps.finite ? steps.whole(q[i]) : 0, low = steps.finite ? steps.rest(q[i]) : 0;
      to.high.at[r * to.d + i] = (int8_t)high;
      to.low.at[r * to.d + i] = (int8_t)low;
      high_sum += (int32_t)high;
      low_sum += (int32_t)low;
      rest += std::fabs(low) + 0.5f;  // low was rounded
    }
    to.scale.at[r] = steps.step;
    to.high_sum.at[r] = high_sum;
    to.low_sum.at[r] = low_sum;
    to.rest.at[r] = rest * steps.step / 254;
  }
}

// Some tokens of one head. Keys are transposed: four bytes of 16 tokens, then the next four, then the next 16 tokens.
// Behind `count`, scales are 0, and keys are anything.
struct Piece {
  Buffer<uint8_t> columns;
  Buffer<float> scale;  // [PIECE], of keys
  float largest_scale;  // NaN if one is
  int64_t count;
  explicit Piece(int64_t d) : columns(PIECE * d), scale(PIECE) {}
};

template <int BITS>
void load_piece(const Tokens& t, int64_t from, int64_t d, Piece& to) {
  alignas(64) uint8_t last[16 * MOST_DIMENSIONS];
  const int64_t row = d * BITS / 8, count = least(PIECE, t.count - from);
  to.count = count;
  for (int64_t i = 0; i < count; i++) to.scale.at[i] = from_half(t.key_scale[from + i]);
  for (int64_t i = count; i < PIECE; i++) to.scale.at[i] = 0;
  to.largest_scale = largest_magnitude(to.scale.at, PIECE);
  for (int64_t i = 0; i < count; i += 16) {
    const uint8_t* keys = t.keys + (from + i) * row;
    if (count - i < 16) {  // do not read past the end
      std::memset(last, 0, sizeof last);
      std::memcpy(last, keys, (count - i) * row);
      keys = last;
    }
    // Into the second cache: the first has no room for so many loads under way.
    for (int64_t j = 0; j < 16 * row; j += 64) __builtin_prefetch(keys + AHEAD * row + j, 0, 2);
    transpose_keys(keys, row, BITS == 8 ? 128 : 0, to.columns.at + i * row);
  }
}

// Sums of products of some queries [COUNT, d] with the keys of BLOCKS times 16 tokens.
template <int BITS, int COUNT>
inline void products(const int8_t* q, int64_t d, const uint8_t* columns, Int16 (&sums)[COUNT][BLOCKS]) {
  const int64_t row = d * BITS / 8;
  for (int j = 0; j < COUNT; j++)
    for (int b = 0; b < BLOCKS; b++) sums[j][b] = zero_int();
  for (int64_t i = 0; i < row; i += 4) {
    Bytes column[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) column[b] = load_bytes(columns + 16 * (b * row + i));
    for (int j = 0; j < COUNT; j++) {
      int32_t four;
      std::memcpy(&four, q + j * d + i, 4);
      for (int b = 0; b < BLOCKS; b++) sums[j][b] = dot(sums[j][b], BITS == 8 ? column[b] : low_nibbles(column[b]), four);
      if (BITS == 8) continue;
      std::memcpy(&four, q + j * d + row + i, 4);
      for (int b = 0; b < BLOCKS; b++) sums[j][b] = dot(sums[j][b], high_nibbles(column[b]), four);
    }
  }
}

template <int BITS>
constexpr int32_t ADDED = BITS == 8 ? 128 : 8;  // to every key, and the largest size of one

// What the high numbers of COUNT queries from r on give to logits [COUNT, PIECE], and the largest of each query; behind
// the piece's last token it is 0.
template <int BITS, int COUNT>
void high_logits(const Queries& q, int64_t r, const Piece& piece, float* to, float* most) {
  Float16 top[COUNT];
  for (int j = 0; j < COUNT; j++) top[j] = zero_float();
  for (int64_t n = 0; n < piece.count; n += 16 * BLOCKS) {
    Int16 sums[COUNT][BLOCKS];
    products<BITS, COUNT>(q.high.at + r * q.d, q.d, piece.columns.at + n * q.d * BITS / 8, sums);
    for (int j = 0; j < COUNT; j++)
      for (int b = 0; b < BLOCKS; b++) {
        const Float16 product = to_float(subtract(sums[j][b], ADDED<BITS> * q.high_sum.at[r + j]));
        const Float16 logits = multiply(times(product, q.scale.at[r + j]), load(piece.scale.at + n + 16 * b));
        store(to + j * PIECE + n + 16 * b, logits);
        top[j] = n + b ? larger(top[j], logits) : logits;
      }
  }
  for (int j = 0; j < COUNT; j++) most[j] = largest(top[j]);
}

// Adds what the low numbers of a query give.
template <int BITS>
void add_low_logits(const Queries& q, int64_t r, const Piece& piece, float* to) {
  for (int64_t n = 0; n < piece.count; n += 16 * BLOCKS) {
    Int16 sums[1][BLOCKS];
    products<BITS, 1>(q.low.at + r * q.d, q.d, piece.columns.at + n * q.d * BITS / 8, sums);
    for (int b = 0; b < BLOCKS; b++) {
      float* at = to + n + 16 * b;
      const Float16 product = to_float(subtract(sums[0][b], ADDED<BITS> * q.low_sum.at[r]));
      store(at, fma(times(product, q.scale.at[r] / 254), load(piece.scale.at + n + 16 * b), load(at)));
    }
  }
}

// Running softmax of every query: a logit, the sum of weights relative to it, the sum of values.
struct State {
  int64_t R, d;
  Buffer<float> most, sum, left_out;  // [R]
  Buffer<float> out;                  // [R, d]
  State(int64_t R, int64_t d) : R(R), d(d), most(R), sum(R), left_out(R), out(R * d) {
    for (int64_t r = 0; r < R; r++) clear(r, LOWEST);
  }
  void clear(int64_t r, float logit) {
    most.at[r] = logit;
    sum.at[r] = left_out.at[r] = 0;
    for (int64_t i = 0; i < d; i++) out.at[r * d + i] = 0;
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

// Logits of a piece [PIECE] become weights relative to the query's logit, and count.
void to_weights(State& state, int64_t r, int64_t count, float* logits) {
  const int64_t padded = (count + 15) / 16 * 16;
  for (int64_t n = count; n < padded; n++) logits[n] = LOWEST;
  const float most = largest(logits, padded);
  if (most > state.most.at[r]) state.rescale(r, most);
  state.sum.at[r] += exponentials(logits, padded, state.most.at[r]);
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

// Values of the tokens whose weight is at least `cut`.
template <int BITS>
void add_values(State& state, int64_t r, const float* weight, float cut, const uint8_t* values, const uint16_t* scale,
                int64_t count) {
  const int64_t d = state.d;
  for (int64_t first = 0; first < count; first += 16) {
    const float* block = weight + first;
    if (largest(block, 16) < cut) {
      for (int64_t n = 0; n < 16; n++) state.left_out.at[r] += block[n];
      continue;
    }
    for (int64_t n = first; n < least(first + 16, count); n++) {
      if (weight[n] < cut)
        state.left_out.at[r] += weight[n];
      else
        add_value<BITS>(state.out.at + r * d, weight[n] * from_half(scale[n]), values + n * d * BITS / 8, d);
    }
  }
}

// Room for one part of the tokens, of a thread.
struct Work {
  Piece piece;
  State state;           // of the part
  Buffer<float> before;  // [R]: log of a sum of weights that are not of this part
  Buffer<float> least;   // [R]: the logit below which a token is left out
  Buffer<float> most;    // [R]: in this piece, of high_logits
  Buffer<float> logits;  // [R, PIECE]
  Work(int64_t R, int64_t d) : piece(d), state(R, d), before(R), least(R), most(R), logits(R * PIECE) {}
};

// Queries from `first` on; each token's share of the softmax may be left out if it is below `share`.
template <int BITS>
void one_part(const Queries& q, int64_t first, const Tokens& t, float share, Work& work) {
  State& state = work.state;
  const float log_share = std::log(share);
  const int64_t R = state.R, row = q.d * BITS / 8;
  for (int64_t r = 0; r < R; r++) {
    state.clear(r, work.before.at[r]);
    work.least.at[r] = log_share + work.before.at[r];
  }
  for (int64_t n = 0; n < t.count; n += PIECE) {
    load_piece<BITS>(t, n, q.d, work.piece);
    const int64_t count = work.piece.count;
    int64_t r = 0;
    for (; r + ROWS <= R; r += ROWS)
      high_logits<BITS, ROWS>(q, first + r, work.piece, work.logits.at + r * PIECE, work.most.at + r);
    for (; r < R; r++) high_logits<BITS, 1>(q, first + r, work.piece, work.logits.at + r * PIECE, work.most.at + r);
    for (r = 0; r < R; r++) {
      const float most = work.most.at[r] + ADDED<BITS> * q.rest.at[first + r] * work.piece.largest_scale;
      if (most < work.least.at[r]) {
        state.left_out.at[r] += (float)count * exponential(most - state.most.at[r]);
        continue;
      }
      float* weight = work.logits.at + r * PIECE;
      add_low_logits<BITS>(q, first + r, work.piece, weight);
      to_weights(state, r, count, weight);
      // All that is known so far: this part and those before it.
      work.least.at[r] = log_share + log_add(state.log_sum(r), work.before.at[r]);
      const float cut = std::exp(work.least.at[r] - state.most.at[r]);
      add_values<BITS>(state, r, weight, cut, t.values + n * row, t.value_scale + n, count);
    }
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
    State mine(G * R, d);
    Work work(R, d);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < K * G; item++) {
      const int64_t first = item % G * R;
#pragma omp critical(known)
      for (int64_t r = 0; r < R; r++) work.before.at[r] = log_add(known.at[first + r], elsewhere[first + r]);
      (tokens[item].bits == 8 ? one_part<8> : one_part<4>)(queries, first, tokens[item], share, work);
      for (int64_t r = 0; r < R; r++) part_lse[item * R + r] = work.state.log_sum(r);
      mine.add(work.state, first);
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
    const float factor = all.sum.at[r] == 0 ? 0 : 1 / all.sum.at[r];
    for (int64_t i = 0; i < d; i++) out[r * d + i] = all.out.at[r * d + i] * factor;
  }
}

}  // namespace

extern const Attend HERD_NAME(attend);
const Attend HERD_NAME(attend) = attend;

}  // namespace herd
