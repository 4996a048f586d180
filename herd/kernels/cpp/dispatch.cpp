// The C ABI of the library, and the choice of instruction set.
#include <cstdlib>
#include <cstring>

#include "levels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace herd {

#define LEVEL(level)                    \
  extern const Attend attend_##level;   \
  extern const Keep keep_##level;       \
  extern const Pack pack_##level;       \
  extern const Linear linear_##level;   \
  extern const Causal causal_##level;   \
  extern const Layers layers_##level;   \
  static const Ops ops_##level = {      \
      #level, attend_##level, keep_##level, pack_##level, linear_##level, causal_##level, layers_##level};
LEVEL(portable)
#if defined(HERD_HAS_avx2)
LEVEL(avx2)
#endif
#if defined(HERD_HAS_avx512)
LEVEL(avx512)
#endif
#if defined(HERD_HAS_neon)
LEVEL(neon)
#endif

static const Ops* choose() {
#if defined(HERD_HAS_avx512)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return &ops_avx512;
#endif
#if defined(HERD_HAS_avx2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &ops_avx2;
#endif
#if defined(HERD_HAS_neon)
  return &ops_neon;
#endif
  return &ops_portable;
}

static const Ops*& chosen() {
  static const Ops* ops = choose();
  return ops;
}

}  // namespace herd

#define API extern "C" __attribute__((visibility("default")))

// The name of the instruction set in use.
API const char* herd_level() { return herd::chosen()->name; }

// Use another one (for tests): 1 if this library and machine have it, else 0 and nothing changes.
API int32_t herd_use_level(const char* name) {
  const herd::Ops* best = herd::choose();
  const herd::Ops* all[] = {
      &herd::ops_portable,
#if defined(HERD_HAS_avx2)
      best == &herd::ops_portable ? nullptr : &herd::ops_avx2,
#endif
      best,
  };
  for (const herd::Ops* ops : all)
    if (ops && !std::strcmp(ops->name, name)) {
      herd::chosen() = ops;
      return 1;
    }
  return 0;
}

// Ask for large pages in memory that was not touched yet. With small ones, finding them takes a good part of the time in
// which weights are read.
API void herd_large_pages(uint8_t* from, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 1 << 21, first = ((uintptr_t)from + page - 1) & -page, end = (uintptr_t)(from + bytes) & -page;
  if (first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);
#else
  (void)from, (void)bytes;
#endif
}

API void herd_pack(const void* w, int32_t type, herd::Weight* to, int64_t threads) {
  herd::chosen()->pack(w, (herd::Type)type, *to, threads);
}

API void herd_linear(const herd::Weight* w, const void* x, int64_t x_stride, int64_t M, void* out, int64_t out_stride,
                     int32_t type, int64_t threads) {
  herd::chosen()->linear(*w, x, x_stride, M, out, out_stride, (herd::Type)type, threads);
}

API void herd_attend(const float* q, int64_t G, int64_t R, int64_t d, const herd::Tokens* tokens, int64_t K,
                     float missed, const float* elsewhere, int64_t threads, float* out, float* lse, float* part_lse,
                     float* left_out) {
  herd::chosen()->attend(q, G, R, d, tokens, K, missed, elsewhere, threads, out, lse, part_lse, left_out);
}

API void herd_keep(const float* x, int64_t rows, int64_t d, int32_t bits, uint8_t* codes, uint16_t* scale) {
  herd::chosen()->keep(x, rows, d, bits, codes, scale);
}

API void herd_causal(const uint16_t* q, const uint16_t* k, const uint16_t* v, int64_t B, int64_t T, int64_t H, int64_t G,
                     int64_t d, uint16_t* out, int64_t threads) {
  herd::chosen()->causal(q, k, v, B, T, H, G, d, out, threads);
}

API void herd_project(const herd::Decoder* decoder, const herd::Layer* layer, const herd::Batch* batch, float* qkv,
                      int64_t threads) {
  herd::chosen()->layers.project(*decoder, *layer, *batch, qkv, threads);
}

API void herd_finish(const herd::Decoder* decoder, const herd::Layer* layer, const herd::Batch* batch,
                     const float* attended, int64_t threads) {
  herd::chosen()->layers.finish(*decoder, *layer, *batch, attended, threads);
}

API void herd_run(const herd::Decoder* decoder, const herd::Layer* layers, int64_t count, const herd::Batch* batch,
                  const herd::Sequence* sequences, int64_t S, int64_t threads) {
  herd::chosen()->layers.run(*decoder, layers, count, *batch, sequences, S, threads);
}

API void herd_own(const herd::Decoder* decoder, const herd::Layer* layer, const herd::Batch* batch,
                  const herd::Sequence* sequences, int64_t S, int64_t at, float* attended, int64_t threads) {
  herd::chosen()->layers.attend(*decoder, *layer, *batch, sequences, S, at, attended, threads);
}

API void* herd_route(const herd::Decoder* decoder, const herd::Layer* layer, const herd::Batch* batch,
                     const float* attended, int32_t* tokens, int64_t threads) {
  return herd::chosen()->layers.route(*decoder, *layer, *batch, attended, tokens, threads);
}

API void herd_feed_forward(void* routed, const uint8_t* which, int64_t threads) {
  herd::chosen()->layers.feed_forward(routed, which, threads);
}

API void herd_add_routed(void* routed, int64_t threads) { herd::chosen()->layers.add_routed(routed, threads); }
