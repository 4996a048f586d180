// Causal attention of whole sequences in bfloat16, for machines that multiply pairs of it; others use PyTorch's.
//
// Keys are packed so that one register holds a pair of dimensions of 16 tokens, values so that one holds a pair of tokens
// in 16 dimensions. Twelve queries go over all their keys, whose logits stay in cache; softmax is in float32.
#include "levels.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

#include <cmath>

#include "buffer.h"
#include "simd.h"
#include "vector_math.h"

namespace herd {
namespace {

constexpr int64_t ROWS = 12;  // queries of a tile
constexpr int64_t KEYS = 32;  // keys of a tile

inline __m512i pair(const uint16_t* from) {
  int32_t both;
  std::memcpy(&both, from, 4);
  return _mm512_set1_epi32(both);
}

inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// One sequence and key/value head, packed; T rounded up to whole tiles of keys, the rest zero.
struct Packed {
  int64_t T, d, tiles;
  Buffer<uint16_t> keys;    // [tiles, d / 2, 32, 2]
  Buffer<uint16_t> values;  // [tiles * 16, d, 2]
  Packed(int64_t T, int64_t d)
      : T(T), d(d), tiles((T + KEYS - 1) / KEYS), keys(tiles * KEYS * d), values(tiles * KEYS * d) {}

  void fill(const uint16_t* k, const uint16_t* v, int64_t stride) {
    for (int64_t t = 0; t < tiles * KEYS; t++)
      for (int64_t i = 0; i < d; i++) {
        keys.at[((t / KEYS * (d / 2) + i / 2) * KEYS + t % KEYS) * 2 + i % 2] = t < T ? k[t * stride + i] : 0;
        values.at[(t / 2 * d + i) * 2 + t % 2] = t < T ? v[t * stride + i] : 0;
      }
  }
};

// Logits of R queries and one tile of keys. to [R, width]
template <int R>
void logits(const Packed& p, const uint16_t* q, int64_t q_stride, int64_t tile, float scale, float* to, int64_t width) {
  __m512 sum[R][2];
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  const uint16_t* k = p.keys.at + tile * KEYS * p.d;
  for (int64_t i = 0; i < p.d; i += 2, k += 2 * KEYS) {
    const __m512i left = _mm512_loadu_si512(k), right = _mm512_loadu_si512(k + KEYS);
    for (int r = 0; r < R; r++) {
      const __m512i x = pair(q + r * q_stride + i);
      sum[r][0] = multiply_add(sum[r][0], x, left);
      sum[r][1] = multiply_add(sum[r][1], x, right);
    }
  }
  for (int r = 0; r < R; r++)
    for (int half = 0; half < 2; half++)
      _mm512_storeu_ps(to + r * width + tile * KEYS + half * 16, _mm512_mul_ps(sum[r][half], _mm512_set1_ps(scale)));
}

// Weights [R, width] in bfloat16 times the values of `pairs` pairs of tokens, 64 dimensions from `from`.
template <int R>
void weigh(const Packed& p, const uint16_t* weight, int64_t width, int64_t pairs, const float* factor, int64_t from,
           uint16_t* out, int64_t out_stride) {
  __m512 sum[R][4];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < 4; c++) sum[r][c] = _mm512_setzero_ps();
  for (int64_t t = 0; t < pairs; t++) {
    const uint16_t* v = p.values.at + (t * p.d + from) * 2;
    __m512i column[4];
    for (int c = 0; c < 4; c++) column[c] = _mm512_loadu_si512(v + 32 * c);
    for (int r = 0; r < R; r++) {
      const __m512i x = pair(weight + r * width + 2 * t);
      for (int c = 0; c < 4; c++) sum[r][c] = multiply_add(sum[r][c], x, column[c]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < 4; c++) {
      const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum[r][c], _mm512_set1_ps(factor[r])));
      _mm256_storeu_si256((__m256i*)(out + r * out_stride + from + 16 * c), narrow);
    }
}

template <int R>
void rows(const Packed& p, const uint16_t* q, int64_t q_stride, int64_t first, uint16_t* out, float* logit,
          uint16_t* weight) {
  const int64_t tiles = (first + R - 1) / KEYS + 1, width = p.tiles * KEYS, seen = tiles * KEYS;
  const float scale = 1.0f / std::sqrt((float)p.d);
  for (int64_t tile = 0; tile < tiles; tile++) logits<R>(p, q, q_stride, tile, scale, logit, width);
  float factor[R];
  for (int r = 0; r < R; r++) {
    float* row = logit + r * width;
    for (int64_t t = first + r + 1; t < seen; t++) row[t] = LOWEST;
    factor[r] = 1.0f / exponentials(row, seen, largest(row, seen));
    for (int64_t t = 0; t < seen; t += 32) {
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + t + 16), _mm512_loadu_ps(row + t));
      _mm512_storeu_si512(weight + r * width + t, (__m512i)both);
    }
  }
  for (int64_t from = 0; from < p.d; from += 64)
    for (int64_t r = 0; r < R; r += 6) {
      const int64_t at = r * q_stride;
      if (R - r >= 6)
        weigh<6>(p, weight + r * width, width, seen / 2, factor + r, from, out + at, q_stride);
      else
        for (int64_t one = r; one < R; one++)
          weigh<1>(p, weight + one * width, width, seen / 2, factor + one, from, out + one * q_stride, q_stride);
    }
}

void causal(const uint16_t* q, const uint16_t* k, const uint16_t* v, int64_t B, int64_t T, int64_t H, int64_t G,
            int64_t d, uint16_t* out, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Packed p(T, d);
    Buffer<float> logit(ROWS * p.tiles * KEYS);
    Buffer<uint16_t> weight(ROWS * p.tiles * KEYS);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t b = 0; b < B; b++)
      for (int64_t g = 0; g < G; g++) {
        p.fill(k + (b * T * G + g) * d, v + (b * T * G + g) * d, G * d);
        for (int64_t h = g * (H / G); h < (g + 1) * (H / G); h++)
          for (int64_t t = 0; t < T;) {
            const int64_t at = ((b * T + t) * H + h) * d, left = T - t;
            if (left >= ROWS) {
              rows<ROWS>(p, q + at, H * d, t, out + at, logit.at, weight.at);
              t += ROWS;
            } else {
              rows<1>(p, q + at, H * d, t, out + at, logit.at, weight.at);
              t++;
            }
          }
      }
  }
}

}  // namespace

extern const Causal HERD_NAME(causal);
const Causal HERD_NAME(causal) = causal;

}  // namespace herd

#else

namespace herd {
extern const Causal HERD_NAME(causal);
const Causal HERD_NAME(causal) = nullptr;
}  // namespace herd

#endif
