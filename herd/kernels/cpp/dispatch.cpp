// The C ABI of the library, and the choice of instruction set.
#include <cstdlib>
#include <cstring>

#include "levels.h"

namespace herd {

#define LEVEL(level)                       \
  extern const Attend attend_##level;      \
  static const Ops ops_##level = {#level, attend_##level};
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

API void herd_attend(const float* q, int64_t G, int64_t R, int64_t d, const herd::Tokens* tokens, int64_t K,
                     float missed, int64_t threads, float* out, float* lse, float* part_lse, float* left_out) {
  herd::chosen()->attend(q, G, R, d, tokens, K, missed, threads, out, lse, part_lse, left_out);
}
