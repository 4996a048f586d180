// 16 lanes of int32 or float32 for the instruction set that this file is compiled for.
#pragma once
#include <cstdint>
#include <cstring>

#include "half.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace herd {
namespace {

#if defined(__AVX512VNNI__)

struct Int16 {
  __m512i v;
};
struct Float16 {
  __m512 v;
};
inline Int16 zero_int() { return {_mm512_setzero_si512()}; }
inline Int16 all_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Float16 zero_float() { return {_mm512_setzero_ps()}; }
inline Float16 all_float(float x) { return {_mm512_set1_ps(x)}; }
inline Float16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Float16 a) { _mm512_storeu_ps(p, a.v); }
inline Float16 to_float(Int16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Int16 to_whole(Float16 a) { return {_mm512_cvtps_epi32(a.v)}; }  // the nearest, ties to even
inline Int16 add(Int16 a, Int16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Int16 subtract(Int16 a, int32_t b) { return {_mm512_sub_epi32(a.v, _mm512_set1_epi32(b))}; }
inline void store_bytes(uint8_t* p, Int16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
inline Float16 fma(Float16 a, Float16 b, Float16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Float16 times(Float16 a, float b) { return {_mm512_mul_ps(a.v, _mm512_set1_ps(b))}; }
inline Float16 multiply(Float16 a, Float16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Float16 larger(Float16 a, Float16 b) { return {_mm512_max_ps(a.v, b.v)}; }
// A bit for each that is not less than b; NaN is not.
inline uint32_t not_below(Float16 a, float b) { return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(b), _CMP_NLT_UQ); }

// 16 outputs times 4 inputs of weights, as unsigned bytes.
struct Bytes {
  __m512i v;
};
inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// In assembly, because GCC copies sums of the intrinsic from register to register, and runs out of them.
inline Int16 dot(Int16 acc, Bytes w, int32_t x4) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(_mm512_set1_epi32(x4)));
  return acc;
}

// 16 pairs of numbers in bfloat16.
struct Pairs {
  __m512i v;
};
// 32 numbers as bfloat16, rounded to the nearest.
inline void store_halves(uint16_t* p, Float16 first, Float16 second) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
}
inline Pairs load_pairs(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline Float16 multiply_add(Float16 sum, Pairs a, uint32_t pair) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(_mm512_set1_epi32((int32_t)pair)));
  return sum;
}

#elif defined(__AVX2__)

struct Int16 {
  __m256i a, b;
};
struct Float16 {
  __m256 a, b;
};
inline Int16 zero_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Int16 all_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Float16 zero_float() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Float16 all_float(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Float16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Float16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline Float16 to_float(Int16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Int16 to_whole(Float16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Int16 add(Int16 x, Int16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Int16 subtract(Int16 x, int32_t y) {
  const __m256i all = _mm256_set1_epi32(y);
  return {_mm256_sub_epi32(x.a, all), _mm256_sub_epi32(x.b, all)};
}
inline Float16 fma(Float16 x, Float16 y, Float16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Float16 times(Float16 x, float y) {
  return {_mm256_mul_ps(x.a, _mm256_set1_ps(y)), _mm256_mul_ps(x.b, _mm256_set1_ps(y))};
}

inline Float16 multiply(Float16 x, Float16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Float16 larger(Float16 x, Float16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline uint32_t not_below(Float16 x, float y) {
  const __m256 all = _mm256_set1_ps(y);
  const int first = _mm256_movemask_ps(_mm256_cmp_ps(x.a, all, _CMP_NLT_UQ));
  return (uint32_t)(first | _mm256_movemask_ps(_mm256_cmp_ps(x.b, all, _CMP_NLT_UQ)) << 8);
}

struct Bytes {
  __m256i a, b;
};
inline Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes high_nibbles(Bytes x) {
  return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
// Even and odd bytes apart, as 16-bit numbers: the instruction that takes bytes would saturate.
inline __m256i dot_half(__m256i acc, __m256i w, __m256i even, __m256i odd) {
  const __m256i w_even = _mm256_and_si256(w, _mm256_set1_epi16(255)), w_odd = _mm256_srli_epi16(w, 8);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(w_even, even));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(w_odd, odd));
}
inline Int16 dot(Int16 acc, Bytes w, int32_t x4) {
  const __m256i x = _mm256_set1_epi32(x4);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
  return {dot_half(acc.a, w.a, even, odd), dot_half(acc.b, w.b, even, odd)};
}

struct Pairs {
  __m256i a, b;
};
inline Pairs load_pairs(const uint16_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))};
}
inline __m256 multiply_add_half(__m256 sum, __m256i x, __m256 first, __m256 second) {
  const __m256 high = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int32_t)0xffff0000)));
  return _mm256_fmadd_ps(high, second, _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), first, sum));
}
inline Float16 multiply_add(Float16 sum, Pairs x, uint32_t pair) {
  const __m256 first = _mm256_castsi256_ps(_mm256_set1_epi32((int32_t)(pair << 16)));
  const __m256 second = _mm256_castsi256_ps(_mm256_set1_epi32((int32_t)(pair & 0xffff0000)));
  return {multiply_add_half(sum.a, x.a, first, second), multiply_add_half(sum.b, x.b, first, second)};
}

#elif defined(__ARM_FEATURE_DOTPROD)

struct Int16 {
  int32x4_t v[4];
};
struct Float16 {
  float32x4_t v[4];
};
struct Bytes {
  uint8x16_t v[4];
};
inline Int16 zero_int() {
  const int32x4_t z = vdupq_n_s32(0);
  return {{z, z, z, z}};
}
inline Int16 all_int(int32_t x) {
  const int32x4_t all = vdupq_n_s32(x);
  return {{all, all, all, all}};
}
inline Float16 zero_float() {
  const float32x4_t z = vdupq_n_f32(0);
  return {{z, z, z, z}};
}
inline Float16 all_float(float x) {
  const float32x4_t all = vdupq_n_f32(x);
  return {{all, all, all, all}};
}
inline Float16 load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
inline void store(float* p, Float16 x) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}
inline Float16 to_float(Int16 x) {
  return {{vcvtq_f32_s32(x.v[0]), vcvtq_f32_s32(x.v[1]), vcvtq_f32_s32(x.v[2]), vcvtq_f32_s32(x.v[3])}};
}
inline Int16 to_whole(Float16 x) {
  return {{vcvtnq_s32_f32(x.v[0]), vcvtnq_s32_f32(x.v[1]), vcvtnq_s32_f32(x.v[2]), vcvtnq_s32_f32(x.v[3])}};
}
inline Int16 add(Int16 x, Int16 y) {
  for (int i = 0; i < 4; i++) x.v[i] = vaddq_s32(x.v[i], y.v[i]);
  return x;
}
inline Int16 subtract(Int16 x, int32_t y) {
  for (int i = 0; i < 4; i++) x.v[i] = vsubq_s32(x.v[i], vdupq_n_s32(y));
  return x;
}
inline Float16 fma(Float16 x, Float16 y, Float16 z) {
  for (int i = 0; i < 4; i++) z.v[i] = vfmaq_f32(z.v[i], x.v[i], y.v[i]);
  return z;
}
inline Float16 times(Float16 x, float y) {
  for (int i = 0; i < 4; i++) x.v[i] = vmulq_n_f32(x.v[i], y);
  return x;
}
inline Float16 multiply(Float16 x, Float16 y) {
  for (int i = 0; i < 4; i++) x.v[i] = vmulq_f32(x.v[i], y.v[i]);
  return x;
}
inline Float16 larger(Float16 x, Float16 y) {
  for (int i = 0; i < 4; i++) x.v[i] = vmaxq_f32(x.v[i], y.v[i]);
  return x;
}
inline uint32_t not_below(Float16 x, float y) {
  static const uint32_t bits[4] = {1, 2, 4, 8};
  uint32_t found = 0;
  for (int i = 0; i < 4; i++)
    found |= vaddvq_u32(vbicq_u32(vld1q_u32(bits), vcltq_f32(x.v[i], vdupq_n_f32(y)))) << 4 * i;
  return found;
}
inline Bytes load_bytes(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
inline Bytes low_nibbles(Bytes x) {
  for (int i = 0; i < 4; i++) x.v[i] = vandq_u8(x.v[i], vdupq_n_u8(15));
  return x;
}
inline Bytes high_nibbles(Bytes x) {
  for (int i = 0; i < 4; i++) x.v[i] = vshrq_n_u8(x.v[i], 4);
  return x;
}
// The instruction multiplies signed bytes: take 128 away first, and add what that misses.
inline Int16 dot(Int16 acc, Bytes w, int32_t x4) {
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(x4));
  const int32x4_t missed = vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), x, vdupq_n_s8(1)), 7);
  for (int i = 0; i < 4; i++) {
    const int8x16_t centred = vreinterpretq_s8_u8(veorq_u8(w.v[i], vdupq_n_u8(128)));
    acc.v[i] = vaddq_s32(vdotq_s32(acc.v[i], centred, x), missed);
  }
  return acc;
}

struct Pairs {
  uint32x4_t v[4];
};
inline Pairs load_pairs(const uint16_t* p) {
  Pairs x;
  for (int i = 0; i < 4; i++) x.v[i] = vreinterpretq_u32_u16(vld1q_u16(p + 8 * i));
  return x;
}
inline Float16 multiply_add(Float16 sum, Pairs x, uint32_t pair) {
  const float first = widen((uint16_t)pair), second = widen((uint16_t)(pair >> 16));
  for (int i = 0; i < 4; i++) {
    sum.v[i] = vfmaq_n_f32(sum.v[i], vreinterpretq_f32_u32(vshlq_n_u32(x.v[i], 16)), first);
    sum.v[i] = vfmaq_n_f32(sum.v[i], vreinterpretq_f32_u32(vandq_u32(x.v[i], vdupq_n_u32(0xffff0000u))), second);
  }
  return sum;
}

#else

struct Int16 {
  int32_t v[16];
};
struct Float16 {
  float v[16];
};
struct Bytes {
  uint8_t v[64];
};
inline Int16 zero_int() { return {}; }
inline Int16 all_int(int32_t x) {
  Int16 all;
  for (int i = 0; i < 16; i++) all.v[i] = x;
  return all;
}
inline Float16 zero_float() { return {}; }
inline Float16 all_float(float x) {
  Float16 all;
  for (int i = 0; i < 16; i++) all.v[i] = x;
  return all;
}
inline Float16 load(const float* p) {
  Float16 x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
inline void store(float* p, Float16 x) { std::memcpy(p, x.v, sizeof x.v); }
inline Float16 to_float(Int16 x) {
  Float16 y;
  for (int i = 0; i < 16; i++) y.v[i] = (float)x.v[i];
  return y;
}
inline Int16 to_whole(Float16 x) {
  Int16 y;
  for (int i = 0; i < 16; i++) y.v[i] = (int32_t)std::rint(x.v[i]);
  return y;
}
inline Int16 add(Int16 x, Int16 y) {
  for (int i = 0; i < 16; i++) x.v[i] += y.v[i];
  return x;
}
inline Int16 subtract(Int16 x, int32_t y) {
  for (int i = 0; i < 16; i++) x.v[i] -= y;
  return x;
}
inline Float16 fma(Float16 x, Float16 y, Float16 z) {
  for (int i = 0; i < 16; i++) z.v[i] += x.v[i] * y.v[i];
  return z;
}
inline Float16 times(Float16 x, float y) {
  for (int i = 0; i < 16; i++) x.v[i] *= y;
  return x;
}
inline Float16 multiply(Float16 x, Float16 y) {
  for (int i = 0; i < 16; i++) x.v[i] *= y.v[i];
  return x;
}
inline Float16 larger(Float16 x, Float16 y) {
  for (int i = 0; i < 16; i++) x.v[i] = x.v[i] > y.v[i] ? x.v[i] : y.v[i];
  return x;
}
inline uint32_t not_below(Float16 x, float y) {
  uint32_t found = 0;
  for (int i = 0; i < 16; i++) found |= (uint32_t)!(x.v[i] < y) << i;
  return found;
}
inline Bytes load_bytes(const uint8_t* p) {
  Bytes x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
inline Bytes low_nibbles(Bytes x) {
  for (int i = 0; i < 64; i++) x.v[i] &= 15;
  return x;
}
inline Bytes high_nibbles(Bytes x) {
  for (int i = 0; i < 64; i++) x.v[i] >>= 4;
  return x;
}
inline Int16 dot(Int16 acc, Bytes w, int32_t x4) {
  int8_t x[4];
  std::memcpy(x, &x4, 4);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) acc.v[i] += (int32_t)w.v[4 * i + j] * x[j];
  return acc;
}

struct Pairs {
  uint16_t v[32];
};
inline Pairs load_pairs(const uint16_t* p) {
  Pairs x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
inline Float16 multiply_add(Float16 sum, Pairs x, uint32_t pair) {
  const float first = widen((uint16_t)pair), second = widen((uint16_t)(pair >> 16));
  for (int i = 0; i < 16; i++) sum.v[i] += widen(x.v[2 * i]) * first + widen(x.v[2 * i + 1]) * second;
  return sum;
}

#endif

inline int32_t sum(Int16 a) {
  int32_t lanes[16], all = 0;
  std::memcpy(lanes, &a, sizeof lanes);
  for (int i = 0; i < 16; i++) all += lanes[i];
  return all;
}

#if !defined(__AVX512VNNI__)
inline void store_bytes(uint8_t* p, Int16 a) {
  int32_t lanes[16];
  std::memcpy(lanes, &a, sizeof lanes);
  for (int i = 0; i < 16; i++) p[i] = (uint8_t)lanes[i];
}
inline void store_halves(uint16_t* p, Float16 first, Float16 second) {
  float wide[32];
  store(wide, first);
  store(wide + 16, second);
  for (int i = 0; i < 32; i++) p[i] = narrow(wide[i]);
}
#endif

inline float largest(Float16 a) {
  float lanes[16];
  store(lanes, a);
  for (int i = 1; i < 16; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
// The largest of 16 * k numbers.
inline float largest(const float* x, int64_t count) {
  Float16 most = load(x);
  for (int64_t n = 16; n < count; n += 16) most = larger(most, load(x + n));
  return largest(most);
}

// Keys of 16 tokens, `row` bytes each, as bytes of weights: four bytes of all 16 tokens, then the next four, each with
// the bits of `flip` flipped. row is a multiple of 32.
#if defined(__AVX512VNNI__)
// COLUMNS of these, from 4 * COLUMNS bytes of each token.
template <int COLUMNS>
inline void transpose_columns(const uint8_t* keys, int64_t row, __m512i flip, uint8_t* to) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++)
    a[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi32((__mmask16)((1 << COLUMNS) - 1), keys + i * row), flip);
  for (int i = 0; i < 16; i += 2) {  // pairs of tokens
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // fours
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; i++) {  // eights, then all
    const __m512i even_low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), odd_low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    b[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    b[i + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    b[i + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  for (int i = 0; i < COLUMNS; i++) _mm512_storeu_si512(to + i * 64, b[i]);
}
inline void transpose_keys(const uint8_t* keys, int64_t row, uint8_t flip, uint8_t* to) {
  const __m512i all = _mm512_set1_epi8((char)flip);
  int64_t from = 0;
  for (; from + 64 <= row; from += 64) transpose_columns<16>(keys + from, row, all, to + from * 16);
  if (from < row) transpose_columns<8>(keys + from, row, all, to + from * 16);
}
#else
inline void transpose_keys(const uint8_t* keys, int64_t row, uint8_t flip, uint8_t* to) {
  const uint32_t all = flip * 0x01010101u;
  for (int64_t i = 0; i < row / 4; i++)
    for (int64_t n = 0; n < 16; n++) {
      uint32_t four;
      std::memcpy(&four, keys + n * row + 4 * i, 4);
      four ^= all;
      std::memcpy(to + (i * 16 + n) * 4, &four, 4);
    }
}
#endif

}  // namespace
}  // namespace herd
