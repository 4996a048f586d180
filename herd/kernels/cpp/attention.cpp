// Attention of some queries over keys and values in 8 or 4 bits, as a context keeps them: one pass over the keys; a value
// is read only where it can matter. BITS: of a key or value.
//
// Queries are split into two int8 numbers each, q = scale * (high + low / 254), so that a logit is exact to 1.6e-5
// sqrt(d) |q| |k|, less than what float16 scales of keys round. The products of the high numbers come first: with a bound
// on the others they tell how large the logits of a step of tokens are at most.
// A token is left out if its share of the softmax is below `missed / tokens`, whatever is still to come: shares only
// shrink. So all that is left out stays below `missed`. Where that holds for all tokens of a step by their bound, the step
// is passed over, and counts as a bound; elsewhere logits are completed, and what is left out is known.
#include <cmath>

#include "buffer.h"
#include "half.h"
#include "levels.h"
#include "simd.h"
#include "vector_math.h"
#include "whole.h"

namespace herd {
namespace {

constexpr int64_t PIECE = 256;  // tokens whose scales are looked at together
constexpr int64_t AHEAD = 256;  // how many tokens before their use keys are fetched
// Queries, and blocks of 16 tokens, whose logits are computed together: each sum waits for its last step, so there must be
// many, but not more than there are registers.
constexpr int ROWS = 3;
#if defined(__AVX512VNNI__)
constexpr int BLOCKS = 2;
#else
constexpr int BLOCKS = 1;
#endif
constexpr int64_t STEP = 16 * BLOCKS;

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

// Some tokens of one head, and the keys of a step of them, transposed: four bytes of 16 tokens, then the next four, then
// the next 16 tokens. Behind `count`, scales are 0, and keys are anything.
struct Piece {
  Buffer<uint8_t> columns;  // of STEP tokens
  Buffer<float> scale;      // [PIECE], of keys
  float largest_scale;      // NaN if one is
  int64_t count;
  explicit Piece(int64_t d) : columns(STEP * d), scale(PIECE) {}
};

void load_scales(const Tokens& t, int64_t from, Piece& to) {
  const int64_t count = to.count = least(PIECE, t.count - from);
  for (int64_t i = 0; i < count; i++) to.scale.at[i] = from_half(t.key_scale[from + i]);
  for (int64_t i = count; i < PIECE; i++) to.scale.at[i] = 0;
  to.largest_scale = largest_magnitude(to.scale.at, PIECE);
}

// Keys of `count` tokens, at most STEP.
void load_keys(const uint8_t* keys, int64_t count, int64_t row, bool wide, uint8_t* columns) {
  alignas(64) uint8_t last[16 * MOST_DIMENSIONS];
  for (int64_t i = 0; i < count; i += 16, keys += 16 * row) {
    const uint8_t* from = keys;
    if (count - i < 16) {  // do not read past the end
      std::memset(last, 0, sizeof last);
      std::memcpy(last, keys, (count - i) * row);
      from = last;
    }
    transpose_keys(from, row, wide ? 128 : 0, columns + i * row);
  }
}

// Sums of products of some queries [COUNT, d] with the keys of STEP tokens. Meanwhile as many bytes from `next` on are
// fetched, if it is given: evenly, because there is no room for many loads under way, and into the second cache.
template <int BITS, int COUNT>
inline void products(const int8_t* q, int64_t d, const uint8_t* columns, const uint8_t* next,
                     Int16 (&sums)[COUNT][BLOCKS]) {
  const int64_t row = d * BITS / 8;
  for (int j = 0; j < COUNT; j++)
    for (int b = 0; b < BLOCKS; b++) sums[j][b] = zero_int();
  for (int64_t i = 0; i < row; i += 4) {
    Bytes column[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) column[b] = load_bytes(columns + 16 * (b * row + i));
    if (next)
      for (int b = 0; b < BLOCKS; b++) __builtin_prefetch(next + STEP * i + 64 * b, 0, 2);
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

// What the high numbers of COUNT queries from r on give to logits [COUNT, STEP] of the tokens from n of the piece on, and
// the largest of each query in `most`; behind the piece's last token it is 0.
template <int BITS, int COUNT>
inline void high_logits(const Queries& q, int64_t r, const Piece& piece, int64_t n, const uint8_t* next, float* to,
                        Float16 (&most)[COUNT]) {
  Int16 sums[COUNT][BLOCKS];
  products<BITS, COUNT>(q.high.at + r * q.d, q.d, piece.columns.at, next, sums);
  for (int j = 0; j < COUNT; j++)
    for (int b = 0; b < BLOCKS; b++) {
      const Float16 product = to_float(subtract(sums[j][b], ADDED<BITS> * q.high_sum.at[r + j]));
      const Float16 logits = multiply(times(product, q.scale.at[r + j]), load(piece.scale.at + n + 16 * b));
      store(to + j * STEP + 16 * b, logits);
      most[j] = b ? larger(most[j], logits) : logits;
    }
}

// Adds what the low numbers give.
template <int BITS, int COUNT>
void add_low_logits(const Queries& q, int64_t r, const Piece& piece, int64_t n, float* to) {
  Int16 sums[COUNT][BLOCKS];
  products<BITS, COUNT>(q.low.at + r * q.d, q.d, piece.columns.at, nullptr, sums);
  for (int j = 0; j < COUNT; j++)
    for (int b = 0; b < BLOCKS; b++, to += 16) {
      const Float16 product = to_float(subtract(sums[j][b], ADDED<BITS> * q.low_sum.at[r + j]));
      store(to, fma(times(product, q.scale.at[r + j] / 254), load(piece.scale.at + n + 16 * b), load(to)));
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

// Logits of a step [STEP] become weights relative to the query's logit, and count.
void to_weights(State& state, int64_t r, int64_t count, float* logits) {
  for (int64_t n = count; n < STEP; n++) logits[n] = LOWEST;
  Float16 most = load(logits);
  for (int64_t n = 16; n < STEP; n += 16) most = larger(most, load(logits + n));
  if (not_below(most, state.most.at[r]) && largest(most) > state.most.at[r]) state.rescale(r, largest(most));
  state.sum.at[r] += exponentials(logits, STEP, state.most.at[r]);
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
  for (int64_t block = 0; block < count; block += 16) {
    uint32_t matter = not_below(load(weight + block), cut);
    if (matter != 0xffff)
      for (int64_t n = 0; n < 16; n++) state.left_out.at[r] += weight[block + n] < cut ? weight[block + n] : 0;
    for (; matter; matter &= matter - 1) {
      const int64_t n = block + __builtin_ctz(matter);
      if (n >= count) break;
      add_value<BITS>(state.out.at + r * state.d, weight[n] * from_half(scale[n]), values + n * state.d * BITS / 8,
                      state.d);
    }
  }
}

// One part of the tokens, of one head, for its R queries from `first` on. Each token's share of the softmax may be left out
// if it is below `share`.
struct Part {
  const Queries& q;
  float share;
  State state;
  Piece piece;
  Buffer<float> before;       // [R]: log of a sum of weights that are not of this part
  Buffer<float> outside;      // [R]: that sum, of weights relative to the state's logit
  Buffer<float> lowest;       // [R]: the logit below which a token is left out
  Buffer<float> limit;        // [R]: where high_logits are below this, it surely is, in this piece
  Buffer<float> looked;       // [R]: how many tokens of the piece were not passed over
  Buffer<float> passed_most;  // [R, 16]: the largest high_logits of the others
  int64_t first;
  Part(const Queries& q, int64_t R, float share)
      : q(q), share(share), state(R, q.d), piece(q.d), before(R), outside(R), lowest(R), limit(R), looked(R),
        passed_most(R * 16) {}

  template <int BITS>
  void run(const Tokens& t, int64_t head_first) {
    first = head_first;
    for (int64_t r = 0; r < state.R; r++) state.clear(r, before.at[r]), outside.at[r] = 1, find_lowest(r);
    const int64_t row = q.d * BITS / 8;
    for (int64_t n = 0; n < t.count; n += PIECE) {
      load_scales(t, n, piece);
      for (int64_t r = 0; r < state.R; r++) {
        limit.at[r] = lowest.at[r] - rest<BITS>(r);
        looked.at[r] = 0;
        store(passed_most.at + 16 * r, all_float(LOWEST));
      }
      for (int64_t i = 0; i < piece.count; i += STEP) {
        load_keys(t.keys + (n + i) * row, least(STEP, piece.count - i), row, BITS == 8, piece.columns.at);
        const uint8_t* next = t.keys + (n + i + AHEAD) * row;
        int64_t r = 0;
        for (; r + ROWS <= state.R; r += ROWS, next = nullptr) some<BITS, ROWS>(t, n, i, r, next);
        for (; r < state.R; r++, next = nullptr) some<BITS, 1>(t, n, i, r, next);
      }
      for (int64_t r = 0; r < state.R; r++) end_piece<BITS>(r);
    }
  }

  // The most that low numbers add to a logit of the piece.
  template <int BITS>
  float rest(int64_t r) const {
    return ADDED<BITS> * q.rest.at[first + r] * piece.largest_scale;
  }

  // A step of tokens, from i of the piece that begins at n, for COUNT queries.
  template <int BITS, int COUNT>
  void some(const Tokens& t, int64_t n, int64_t i, int64_t r, const uint8_t* next) {
    alignas(64) float logits[COUNT * STEP];
    Float16 most[COUNT];
    high_logits<BITS, COUNT>(q, first + r, piece, i, next, logits, most);
    bool look[COUNT], any = false;
    for (int j = 0; j < COUNT; j++) any |= look[j] = not_below(most[j], limit.at[r + j]);
    if (any) {
      for (int j = 0; j < COUNT; j++)
        if (look[j]) fetch_values<BITS>(t, n + i, limit.at[r + j], logits + j * STEP);
      add_low_logits<BITS, COUNT>(q, first + r, piece, i, logits);
    }
    for (int j = 0; j < COUNT; j++) {
      float* passed_so_far = passed_most.at + 16 * (r + j);
      if (look[j])
        add<BITS>(t, n, i, r + j, logits + j * STEP);
      else
        store(passed_so_far, larger(load(passed_so_far), most[j]));
    }
  }

  // They are far apart, so each waits for memory: begin while logits are completed.
  template <int BITS>
  void fetch_values(const Tokens& t, int64_t at, float above, const float* logits) const {
    for (int64_t block = 0; block < STEP; block += 16)
      for (uint32_t matter = not_below(load(logits + block), above); matter; matter &= matter - 1)
        __builtin_prefetch(t.values + (at + block + __builtin_ctz(matter)) * q.d * BITS / 8);
  }

  // A step for a query that cannot pass it over.
  template <int BITS>
  void add(const Tokens& t, int64_t n, int64_t i, int64_t r, float* logits) {
    const int64_t count = least(STEP, piece.count - i), at = n + i;
    looked.at[r] += (float)count;
    const float before_most = state.most.at[r];
    to_weights(state, r, count, logits);
    if (state.most.at[r] != before_most) outside.at[r] = std::exp(before.at[r] - state.most.at[r]);
    // All that is known so far: this part and those before it.
    const float cut = share * (state.sum.at[r] + outside.at[r]);
    add_values<BITS>(state, r, logits, cut, t.values + at * q.d * BITS / 8, t.value_scale + at, count);
  }

  void find_lowest(int64_t r) {
    lowest.at[r] = state.most.at[r] + std::log(share * (state.sum.at[r] + outside.at[r]));
  }

  template <int BITS>
  void end_piece(int64_t r) {
    const float passed = (float)piece.count - looked.at[r];
    if (passed > 0) {
      const float most = largest(load(passed_most.at + 16 * r)) + rest<BITS>(r);
      state.left_out.at[r] += passed * exponential(most - state.most.at[r]);
    }
    if (looked.at[r] > 0) find_lowest(r);
  }
};

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
    Part part(queries, R, share);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < K * G; item++) {
      const int64_t first = item % G * R;
#pragma omp critical(known)
      for (int64_t r = 0; r < R; r++) part.before.at[r] = log_add(known.at[first + r], elsewhere[first + r]);
      if (tokens[item].bits == 8)
        part.run<8>(tokens[item], first);
      else
        part.run<4>(tokens[item], first);
      for (int64_t r = 0; r < R; r++) part_lse[item * R + r] = part.state.log_sum(r);
      mine.add(part.state, first);
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
