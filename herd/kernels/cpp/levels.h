// The operations, each compiled once for each instruction set. dispatch.cpp chooses one set when the library is loaded.
#pragma once
#include <cstdint>

#define HERD_JOIN_(name, level) name##_##level
#define HERD_JOIN(name, level) HERD_JOIN_(name, level)
#define HERD_NAME(name) HERD_JOIN(name, HERD_LEVEL)

namespace herd {

// Element types of activations, as numbered in native.py.
enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

// A weight of N outputs and K inputs in 8 or 4 bits, packed by `herd_pack`; a scale for each output and `group` of inputs.
struct Weight {
  const uint8_t* packed;
  const float* scale;  // [K / group, panels(N) * 32]
  int64_t N, K;
  int32_t group, bits;
};

constexpr int64_t PANEL = 32;  // outputs that one tile computes together
inline int64_t panels(int64_t N) { return (N + PANEL - 1) / PANEL; }

// x [M, K] times weight^T to out [M, N]; strides in elements; each row of x is quantised to int8 in the same groups.
using Linear = void (*)(const Weight&, const void* x, int64_t x_stride, int64_t M, void* out, int64_t out_stride, Type,
                        int64_t threads);

// Keys and values [count, d] of one head with float16 scales: int8, or 4 bits with 8 added, of which byte i of a token
// holds number i in its low half and number i + d / 2 in its high half.
struct Tokens {
  const uint8_t *keys, *values;
  const uint16_t *key_scale, *value_scale;
  int64_t count;
  int32_t bits;
};

// Attention of q [G, R, d], already scaled, over tokens [K, G]; d is a multiple of 64, at most 256. Results are
// float32: out [G, R, d], log-denominators lse [G, R] and of each part [K, G, R], and the shares of the softmax whose
// values were left out [G, R], each below `missed`. In these shares other tokens count too: elsewhere [G, R] is the log
// of the sum of exp of their logits, which may be -inf.
using Attend = void (*)(const float* q, int64_t G, int64_t R, int64_t d, const Tokens*, int64_t K, float missed,
                        const float* elsewhere, int64_t threads, float* out, float* lse, float* part_lse,
                        float* left_out);

// Causal attention of B sequences of T tokens in bfloat16: q, out [B, T, H, d], k, v [B, T, G, d], d a multiple of 64.
// Null where there is no native one.
using Causal = void (*)(const uint16_t* q, const uint16_t* k, const uint16_t* v, int64_t B, int64_t T, int64_t H,
                        int64_t G, int64_t d, uint16_t* out, int64_t threads);

struct Ops {
  const char* name;
  Attend attend;
  Linear linear;
  Causal causal;
};

}  // namespace herd
