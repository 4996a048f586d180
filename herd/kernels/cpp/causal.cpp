// Causal attention of whole sequences in bfloat16.
#include "own.h"

namespace herd {
namespace {

// One sequence and key/value head; all of q, k, v and out begin at it.
void attend_head(const uint16_t* q, const uint16_t* k, const uint16_t* v, int64_t T, int64_t H, int64_t G, int64_t d,
                 uint16_t* out) {
  const int64_t group = H / G;
  Buffer<uint16_t> room(2 * whole(T) * d);
  Buffer<float> wide(2 * ROWS * d);
  std::memset(room.at, 0, 2 * whole(T) * d * 2);
  Memory memory(room.at, 0, T, d);
  for (int64_t t = 0; t < T; t++) {
    for (int64_t i = 0; i < d; i++) {
      wide.at[i] = widen(k[t * G * d + i]);
      wide.at[d + i] = widen(v[t * G * d + i]);
    }
    memory.put(t, 1, wide.at, wide.at + d, 0);
  }
  for (int64_t first = 0; first < T * group; first += ROWS) {
    const int64_t R = least(ROWS, T * group - first);
    Query queries[ROWS];
    for (int64_t r = 0; r < R; r++) {
      const int64_t t = (first + r) / group, at = (t * H + (first + r) % group) * d;
      for (int64_t i = 0; i < d; i++) wide.at[r * d + i] = widen(q[at + i]);
      queries[r] = {wide.at + r * d, t + 1, wide.at + (ROWS + r) * d};
    }
    attend_own(memory, queries, R, 1 / std::sqrt((float)d));
    for (int64_t r = 0; r < R; r++) {
      const int64_t at = ((first + r) / group * H + (first + r) % group) * d;
      for (int64_t i = 0; i < d; i++) out[at + i] = narrow(queries[r].out[i]);
    }
  }
}

void causal(const uint16_t* q, const uint16_t* k, const uint16_t* v, int64_t B, int64_t T, int64_t H, int64_t G,
            int64_t d, uint16_t* out, int64_t threads) {
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
  for (int64_t b = 0; b < B; b++)
    for (int64_t g = 0; g < G; g++) {
      const int64_t at = (b * T * H + g * (H / G)) * d, kv = (b * T * G + g) * d;
      attend_head(q + at, k + kv, v + kv, T, H, G, d, out + at);
    }
}

}  // namespace

extern const Causal HERD_NAME(causal);
const Causal HERD_NAME(causal) = causal;

}  // namespace herd
