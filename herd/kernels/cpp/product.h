// Products of some rows of activations with packed weights, in 8, 4 or 16 bits.
//
// Weights are packed in panels of 32 outputs. In 8 bits, four inputs of 16 outputs are 64 bytes, so that one instruction
// multiplies them with four inputs of a row; in 4 bits such 64 bytes hold eight inputs, the first four in the low halves;
// in 16 bits (bfloat16) they hold two. Weights in 8 (4) bits are stored with 128 (8) added: that times the sum of the
// row's inputs is where a sum begins, with the other sign. Rows are quantised to int8 in the groups of the weight.
#pragma once
#include <cmath>
#include <utility>

#include "buffer.h"
#include "levels.h"
#include "simd.h"
#include "whole.h"

#define INLINE inline __attribute__((always_inline))

namespace herd {
namespace {

// Rows of a tile. 24 sums and the weights fill the 32 registers of AVX-512; sums of other levels take two to four registers.
#if defined(__AVX512VNNI__)
constexpr int64_t ROWS = 12;
#else
constexpr int64_t ROWS = 4;
#endif
constexpr int64_t BLOCK_ROWS = 192;  // of activations that stay in the second-level cache
constexpr int FEW = 4;                // rows that wait for memory, not for arithmetic
constexpr int64_t AHEAD = 3072;      // bytes: how far ahead weights are fetched where few rows share them

// M rows of K inputs as tiles multiply them: four bytes of each of the tile's rows, then the next four.
struct Rows {
  int64_t M, K, groups;
  int32_t group, bits;  // as of the weight
  Buffer<uint8_t> q;
  Buffer<float> scale;     // [tile, groups, rows of the tile]
  Buffer<int32_t> offset;  // where the sums of a group begin, like scale
  Rows(int64_t M, const Weight& w)
      : M(M), K(w.K), groups(w.bits == 16 ? 1 : w.K / w.group), group(w.group), bits(w.bits),
        q(M * K * width()), scale(M * groups), offset(M * groups) {}

  int64_t width() const { return bits == 16 ? 2 : 1; }
  static int64_t of_tile(int64_t row, int64_t rows) { return least(ROWS, rows - row / ROWS * ROWS); }

  // Row `row` of `rows` that stand together from row `first` on; a tile never holds rows of two such sets.
  void put(const float* x, int64_t row, int64_t first, int64_t rows) {
    const int64_t R = of_tile(row, rows), r = row % ROWS, tile = first + row - r;
    uint8_t* to = q.at + tile * K * width() + r * 4;
    if (bits == 16) {
      for (int64_t k = 0; k < K; k += 2, to += R * 4) {
        const uint16_t both[2] = {narrow(x[k]), narrow(x[k + 1])};
        std::memcpy(to, both, 4);
      }
      return;
    }
    for (int64_t g = 0; g < groups; g++, x += group) {
      const Steps steps(largest_magnitude(x, group));
      const int32_t sum = quantise(x, steps, to, R * 4);
      to += group * R;
      scale.at[tile * groups + g * R + r] = steps.step;
      offset.at[tile * groups + g * R + r] = -(bits == 8 ? 128 : 8) * sum;
    }
  }

 private:
  // A group to int8, four of them every `stride` bytes; returns their sum. group is a multiple of 8.
  int32_t quantise(const float* x, const Steps& steps, uint8_t* to, int64_t stride) const {
    if (!steps.finite) {
      for (int32_t k = 0; k < group; k += 4, to += stride) std::memset(to, 0, 4);
      return 0;
    }
    Int16 sums = zero_int();
    int32_t k = 0;
    for (; k + 16 <= group; k += 16) {
      const Int16 whole = to_whole(times(load(x + k), steps.inverse));
      sums = add(sums, whole);
      uint8_t bytes[16];
      store_bytes(bytes, whole);
      for (int i = 0; i < 16; i += 4, to += stride) std::memcpy(to, bytes + i, 4);
    }
    int32_t all = sum(sums);
    for (; k < group; k += 4, to += stride)
      for (int i = 0; i < 4; i++) {
        const int32_t whole = (int32_t)steps.whole(x[k + i]);
        all += whole;
        to[i] = (uint8_t)whole;
      }
    return all;
  }
};

// Into the second cache: there is room for more loads under way than into the first.
inline void fetch(const uint8_t* p) {
  __builtin_prefetch(p + AHEAD, 0, 2);
  __builtin_prefetch(p + AHEAD + 64, 0, 2);
}

inline uint32_t four_bytes(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  return four;
}

// Sums of R rows and 32 outputs. Nested, not an array: each must be a register, which compilers miss in arrays.
template <int R, class Lanes>
struct Sums {
  Lanes left, right;
  Sums<R - 1, Lanes> rest;

  INLINE void begin(const int32_t* offset) {
    left = right = all_int(*offset);
    rest.begin(offset + 1);
  }
  INLINE void begin() {
    left = right = zero_float();
    rest.begin();
  }
  // x: four bytes of each row, which are `STEP` bytes apart.
  template <int STEP>
  INLINE void add(Bytes a, Bytes b, const uint8_t* x) {
    const int32_t four = (int32_t)four_bytes(x);
    left = dot(left, a, four);
    right = dot(right, b, four);
    rest.template add<STEP>(a, b, x + STEP);
  }
  template <int STEP>
  INLINE void add(Pairs a, Pairs b, const uint8_t* x) {
    const uint32_t pair = four_bytes(x);
    left = multiply_add(left, a, pair);
    right = multiply_add(right, b, pair);
    rest.template add<STEP>(a, b, x + STEP);
  }
  INLINE void scale(Float16 a, Float16 b, const float* factor, bool first, float* to) const {
    store(to, fma(times(to_float(left), *factor), a, first ? zero_float() : load(to)));
    store(to + 16, fma(times(to_float(right), *factor), b, first ? zero_float() : load(to + 16)));
    rest.scale(a, b, factor + 1, first, to + PANEL);
  }
  INLINE void write(float* to, int64_t stride) const {
    store(to, left);
    store(to + 16, right);
    rest.write(to + stride, stride);
  }
};

template <class Lanes>
struct Sums<0, Lanes> {
  INLINE void begin(const int32_t*) {}
  INLINE void begin() {}
  template <int STEP>
  INLINE void add(Bytes, Bytes, const uint8_t*) {}
  template <int STEP>
  INLINE void add(Pairs, Pairs, const uint8_t*) {}
  INLINE void scale(Float16, Float16, const float*, bool, float*) const {}
  INLINE void write(float*, int64_t) const {}
};

// R rows times one panel of a weight in 8 or 4 bits, to sums [R, 32].
template <int R, int BITS>
void whole_tile(const Weight& w, const Rows& rows, int64_t first, int64_t panel, float* to) {
  const int64_t steps = w.group / (BITS == 8 ? 4 : 8);
  const uint8_t *p = w.packed + panel * PANEL * w.K * BITS / 8, *x = rows.q.at + first * w.K;
  const float* scale = rows.scale.at + first * rows.groups;
  const int32_t* offset = rows.offset.at + first * rows.groups;
  for (int64_t g = 0; g < rows.groups; g++, scale += R, offset += R) {
    Sums<R, Int16> sums;
    sums.begin(offset);
    for (int64_t s = 0; s < steps; s++, p += 2 * 64, x += 4 * R) {
      const Bytes left = load_bytes(p), right = load_bytes(p + 64);
      if (R <= FEW) fetch(p);
      if (BITS == 8) {
        sums.template add<4>(left, right, x);
        continue;
      }
      sums.template add<4>(low_nibbles(left), low_nibbles(right), x);
      x += 4 * R;
      sums.template add<4>(high_nibbles(left), high_nibbles(right), x);
    }
    const float* ours = w.scale + (panel * rows.groups + g) * PANEL;
    sums.scale(load(ours), load(ours + 16), scale, g == 0, to);
  }
}

// R rows times 32 outputs in bfloat16 over `pairs` pairs of inputs; the sums of a row are `stride` apart. STEP: bytes
// between rows of x, 4 where a pair of each row stands together.
template <int R, int STEP = 4>
inline void half_sums(const uint16_t* p, int64_t pairs, const uint8_t* x, float* to, int64_t stride) {
  Sums<R, Float16> sums;
  sums.begin();
  for (int64_t i = 0; i < pairs; i++, p += 2 * PANEL, x += STEP == 4 ? 4 * R : 4) {
    if (R <= FEW) fetch((const uint8_t*)p);
    sums.template add<STEP>(load_pairs(p), load_pairs(p + PANEL), x);
  }
  sums.write(to, stride);
}

template <int R>
void half_tile(const Weight& w, const Rows& rows, int64_t first, int64_t panel, float* to) {
  const uint16_t* p = (const uint16_t*)w.packed + panel * PANEL * w.K;
  half_sums<R>(p, w.K / 2, rows.q.at + first * w.K * 2, to, PANEL);
}

using Tile = void (*)(const Weight&, const Rows&, int64_t, int64_t, float*);

template <size_t... I>
Tile tile_of(int64_t rows, int32_t bits, std::index_sequence<I...>) {
  static constexpr Tile table[][ROWS] = {{whole_tile<I + 1, 4>...}, {whole_tile<I + 1, 8>...}, {half_tile<I + 1>...}};
  return table[bits == 4 ? 0 : bits == 8 ? 1 : 2][rows - 1];
}

inline Tile tile_of(int64_t rows, int32_t bits) { return tile_of(rows, bits, std::make_index_sequence<ROWS>()); }

// `count` rows from `first` on, which stand together, times a weight.
struct Product {
  const Weight* weight;
  const Rows* rows;
  int64_t first, count;
  int64_t units() const { return (count + BLOCK_ROWS - 1) / BLOCK_ROWS * panels(weight->N); }
};

// All products, shared between the threads of a team that all call this; they wait for each other at its end. Results
// [R, 32] of rows from `row` on go to sink(which product, row, R, panel, results).
template <class Sink>
void multiply(const Product* products, int64_t count, const Sink& sink) {
  int64_t units = 0, rows = 0;
  for (int64_t i = 0; i < count; i++) units += products[i].units(), rows += products[i].count;
  // Shares of panels that follow each other: where rows wait for memory, long ones, because each begins with weights that
  // were not fetched and ends with some that another thread wants; else short ones, so that threads end together.
  const int64_t share = most(1, units / ((rows <= FEW ? 2 : 16) * team_size()));
#pragma omp for schedule(dynamic, share)
  for (int64_t unit = 0; unit < units; unit++) {
    int64_t i = 0, at = unit;
    while (at >= products[i].units()) at -= products[i++].units();
    const Product& one = products[i];
    const int64_t all = panels(one.weight->N), panel = at % all;
    const int64_t begin = at / all * BLOCK_ROWS, end = least(one.count, begin + BLOCK_ROWS);
    alignas(64) float sums[ROWS * PANEL];
    for (int64_t row = begin; row < end; row += ROWS) {
      const int64_t R = least(ROWS, end - row);
      tile_of(R, one.weight->bits)(*one.weight, *one.rows, one.first + row, panel, sums);
      sink(i, one.first + row, R, panel, sums);
    }
  }
}

}  // namespace
}  // namespace herd
