// Linear layers with weights in 8 or 4 bits; activations are quantised to int8 in each row and group of inputs.
//
// Weights are packed in panels of 32 outputs. In 8 bits, four inputs of 16 outputs are 64 bytes, so that one
// instruction multiplies them with four inputs of a row; in 4 bits such 64 bytes hold eight inputs, the first four in the
// low halves. Weights are stored with 128 (8) added: that times the sum of the row's inputs is taken away at the end.
#include <cmath>

#include "buffer.h"
#include "levels.h"
#include "simd.h"

namespace herd {
namespace {

constexpr int64_t ROWS = 12;         // of a tile: 24 sums and the weights fill the 32 registers of AVX-512
constexpr int64_t BLOCK_ROWS = 192;  // of activations that stay in the second-level cache

float widen(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint16_t narrow(float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Rows in int8 with one scale for each group, and `offset` times the sum of each group.
struct Rows {
  Buffer<int8_t> q;        // [M, K]
  Buffer<float> scale;     // [M, K / group]
  Buffer<int32_t> excess;  // [M, K / group]
  Rows(int64_t M, int64_t K, int64_t groups) : q(M * K), scale(M * groups), excess(M * groups) {}
};

void quantise_row(const float* x, const Weight& w, int64_t row, Rows& rows) {
  const int32_t offset = w.bits == 8 ? 128 : 8;
  for (int64_t g = 0; g < w.K / w.group; g++) {
    const float* part = x + g * w.group;
    float most = 0;
    for (int32_t i = 0; i < w.group; i++) most = std::fabs(part[i]) > most ? std::fabs(part[i]) : most;
    const float inverse = most > 0 ? 127 / most : 0;
    int8_t* q = rows.q.at + row * w.K + g * w.group;
    int32_t sum = 0;
    for (int32_t i = 0; i < w.group; i++) {
      q[i] = (int8_t)(int32_t)std::rint(part[i] * inverse);
      sum += q[i];
    }
    rows.scale.at[row * (w.K / w.group) + g] = most / 127;
    rows.excess.at[row * (w.K / w.group) + g] = offset * sum;
  }
}

void quantise(const Weight& w, const void* x, int64_t stride, int64_t M, Type type, int64_t threads, Rows& rows) {
#pragma omp parallel num_threads(threads) if (M > 16)
  {
    Buffer<float> wide(w.K);
#pragma omp for
    for (int64_t row = 0; row < M; row++) {
      const float* single = (const float*)x + row * stride;
      if (type == BFLOAT16) {
        const uint16_t* half = (const uint16_t*)x + row * stride;
        for (int64_t k = 0; k < w.K; k++) wide.at[k] = widen(half[k]);
        single = wide.at;
      }
      quantise_row(single, w, row, rows);
    }
  }
}

// 8 inputs of 32 outputs, in 4 bits, or 4 of them in 8 bits: the next step of a panel.
template <int R, int BITS>
inline void step(Int16 (&sum)[R][2], const uint8_t*& w, const int8_t* x, int64_t K) {
  const Bytes left = load_bytes(w), right = load_bytes(w + 64);
  w += 128;
  for (int half = 0; half < (BITS == 8 ? 1 : 2); half++) {
    const Bytes a = BITS == 8 ? left : half ? high_nibbles(left) : low_nibbles(left);
    const Bytes b = BITS == 8 ? right : half ? high_nibbles(right) : low_nibbles(right);
    for (int r = 0; r < R; r++) {
      int32_t x4;
      std::memcpy(&x4, x + r * K + 4 * half, 4);
      sum[r][0] = dot(sum[r][0], a, x4);
      sum[r][1] = dot(sum[r][1], b, x4);
    }
  }
}

// R rows times one panel, to sums [R, 32].
template <int R, int BITS>
void tile(const Weight& weight, const Rows& rows, int64_t row, int64_t panel, float* out) {
  const int64_t K = weight.K, groups = K / weight.group, steps = weight.group / (BITS == 8 ? 4 : 8);
  const uint8_t* w = weight.packed + panel * PANEL * K * BITS / 8;
  const int8_t* x = rows.q.at + row * K;
  for (int64_t g = 0; g < groups; g++) {
    Int16 sum[R][2];
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = zero_int();
    for (int64_t s = 0; s < steps; s++, x += BITS == 8 ? 4 : 8) step<R, BITS>(sum, w, x, K);
    const float* scale = weight.scale + (g * panels(weight.N) + panel) * PANEL;
    for (int r = 0; r < R; r++) {
      const int64_t at = (row + r) * groups + g;
      for (int half = 0; half < 2; half++) {
        const Float16 part = to_float(subtract(sum[r][half], rows.excess.at[at]));
        float* o = out + r * PANEL + half * 16;
        const Float16 before = g ? load(o) : zero_float();
        store(o, fma(times(part, rows.scale.at[at]), load(scale + half * 16), before));
      }
    }
  }
}

using Tile = void (*)(const Weight&, const Rows&, int64_t, int64_t, float*);

template <int BITS>
Tile tile_of(int64_t rows) {
  static constexpr Tile table[] = {tile<1, BITS>, tile<2, BITS>, tile<3, BITS>,  tile<4, BITS>,
                                   tile<5, BITS>, tile<6, BITS>, tile<7, BITS>,  tile<8, BITS>,
                                   tile<9, BITS>, tile<10, BITS>, tile<11, BITS>, tile<12, BITS>};
  return table[rows - 1];
}

void write(const float* from, void* to, int64_t count, Type type) {
  if (type == FLOAT32) {
    std::memcpy(to, from, count * 4);
  } else {
    for (int64_t i = 0; i < count; i++) ((uint16_t*)to)[i] = narrow(from[i]);
  }
}

void linear(const Weight& w, const void* x, int64_t x_stride, int64_t M, void* out, int64_t out_stride, Type type,
            int64_t threads) {
  Rows rows(M, w.K, w.K / w.group);
  quantise(w, x, x_stride, M, type, threads, rows);
  const int64_t blocks = (M + BLOCK_ROWS - 1) / BLOCK_ROWS, size = type == FLOAT32 ? 4 : 2;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t panel = 0; panel < panels(w.N); panel++) {
      alignas(64) float sums[ROWS * PANEL];
      const int64_t end = least(M, (block + 1) * BLOCK_ROWS), count = least(PANEL, w.N - panel * PANEL);
      for (int64_t row = block * BLOCK_ROWS; row < end; row += ROWS) {
        const int64_t R = least(ROWS, end - row);
        (w.bits == 8 ? tile_of<8>(R) : tile_of<4>(R))(w, rows, row, panel, sums);
        for (int64_t r = 0; r < R; r++)
          write(sums + r * PANEL, (char*)out + ((row + r) * out_stride + panel * PANEL) * size, count, type);
      }
    }
}

}  // namespace

extern const Linear HERD_NAME(linear);
const Linear HERD_NAME(linear) = linear;

}  // namespace herd
