// The operations, each compiled once for each instruction set. dispatch.cpp chooses one set when the library is loaded.
#pragma once
#include <cstdint>

#define HERD_JOIN_(name, level) name##_##level
#define HERD_JOIN(name, level) HERD_JOIN_(name, level)
#define HERD_NAME(name) HERD_JOIN(name, HERD_LEVEL)

namespace herd {

// Element types of activations, as numbered in native.py.
enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

// A weight of N outputs and K inputs as `herd_pack` packs it (product.h): in 8 or 4 bits, with a scale for each output and
// `group` of inputs, or in 16 (bfloat16). group, and K, are multiples of 8.
struct Weight {
  const uint8_t* packed;  // panels(N) * 32 * K * bits / 8 bytes
  const float* scale;     // [panels(N), K / group, 32]; none in 16 bits
  int64_t N, K;
  int32_t group, bits;
};

constexpr int64_t PANEL = 32;  // outputs that one tile computes together
inline int64_t panels(int64_t N) { return (N + PANEL - 1) / PANEL; }

// Fill the memory of a weight from numbers [N, K].
using Pack = void (*)(const void* w, Type, Weight&, int64_t threads);

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
// float32: out [G, R, d], log-denominators lse [G, R] and of each part [K, G, R] of the tokens that were not passed over,
// and the most that the shares of the softmax can be that were left out [G, R], each below `missed`. In these shares
// other tokens count too: elsewhere [G, R] is the log of the sum of exp of their logits, which may be -inf.
using Attend = void (*)(const float* q, int64_t G, int64_t R, int64_t d, const Tokens*, int64_t K, float missed,
                        const float* elsewhere, int64_t threads, float* out, float* lse, float* part_lse,
                        float* left_out);

// Codes [rows, d * bits / 8] and float16 scales [rows] of keys or values [rows, d] for Tokens. Those of a row with NaN, or
// with numbers too large for float16, mean nothing; its scale is not finite. In the thread that calls, so that a forked
// process can.
using Keep = void (*)(const float* x, int64_t rows, int64_t d, int32_t bits, uint8_t* codes, uint16_t* scale);

constexpr int64_t MOST_DIMENSIONS = 256;  // of a head; d is a multiple of 64

// Causal attention of B sequences of T tokens in bfloat16: q, out [B, T, H, d], k, v [B, T, G, d].
using Causal = void (*)(const uint16_t* q, const uint16_t* k, const uint16_t* v, int64_t B, int64_t T, int64_t H,
                        int64_t G, int64_t d, uint16_t* out, int64_t threads);

// A SwiGLU block: gate_up holds 16 gates, the 16 ups that belong to them, and so on.
struct Mlp {
  Weight gate_up, down;
};

struct Layer {
  const float *attention_norm, *mlp_norm;  // [D]
  Weight qkv, out;                         // all heads' q, then k, then v
  Mlp shared;                              // or the only one
  const Mlp* experts;                      // [E]
  const float* router;                     // [E, D]
  int64_t E, top_k;                        // 0, 0: dense
  int32_t local, qk_norm;
};

struct Decoder {
  int64_t D, H, G, d;  // hidden size, query heads, key/value heads, their dimensions (a multiple of 64)
  float eps;
};

// N tokens: x [N, D], cosines and sines of their angles [N, d / 2, 2], factors of global queries [N] or null.
struct Batch {
  int64_t N;
  float* x;
  const float *turns, *temperature;
};

// Tokens of one sequence from `first` of the batch on, in one attention chunk, after `past` ones that local (global)
// layers remember in memory for `capacity` tokens: of each layer, own.h says how; it begins as zeros.
struct Sequence {
  int64_t first, tokens, local_past, global_past, local_capacity, global_capacity;
  uint16_t* const* memory;
};

// project: q, k and v [N, (H + 2 G) d] that a layer attends with. finish: x after the layer, from what attention gave
// [N, H, d]. run: x after some layers whose sequences see nothing but themselves.
//
// The same layer by layer and in steps, for experts that are not all in memory: attend is the first part of a layer of
// `run`, the one at `at` of the sequences' memories. route begins what `finish` does and tells how many tokens each expert
// has [E]; its arguments must live on. feed_forward computes the shared block and experts, those of [1 + E] that are not 0,
// whose weights must be there now; each is computed once. add_routed is the end, and frees what route gave.
struct Layers {
  void (*project)(const Decoder&, const Layer&, const Batch&, float* qkv, int64_t threads);
  void (*finish)(const Decoder&, const Layer&, const Batch&, const float* attended, int64_t threads);
  void (*run)(const Decoder&, const Layer*, int64_t count, const Batch&, const Sequence*, int64_t S, int64_t threads);
  void (*attend)(const Decoder&, const Layer&, const Batch&, const Sequence*, int64_t S, int64_t at, float* attended,
                 int64_t threads);
  void* (*route)(const Decoder&, const Layer&, const Batch&, const float* attended, int32_t* tokens, int64_t threads);
  void (*feed_forward)(void* routed, const uint8_t* which, int64_t threads);
  void (*add_routed)(void* routed, int64_t threads);
};

struct Ops {
  const char* name;
  Attend attend;
  Keep keep;
  Pack pack;
  Linear linear;
  Causal causal;
  Layers layers;
};

}  // namespace herd
