// One linear layer: activations are laid out for the weight's kind, then multiplied (product.h). And the packing of weights.
#include "product.h"

namespace herd {
namespace {

void write(const float* from, void* to, int64_t count, Type type) {
  if (type == FLOAT32) {
    std::memcpy(to, from, count * 4);
  } else {
    for (int64_t i = 0; i < count; i++) ((uint16_t*)to)[i] = narrow(from[i]);
  }
}

// One row of numbers in float32: where it stands, or widened into `room`.
const float* wide_row(const void* x, int64_t from, int64_t count, Type type, float* room) {
  if (type == FLOAT32) return (const float*)x + from;
  for (int64_t k = 0; k < count; k++) room[k] = widen(((const uint16_t*)x)[from + k]);
  return room;
}

void linear(const Weight& w, const void* x, int64_t x_stride, int64_t M, void* out, int64_t out_stride, Type type,
            int64_t threads) {
  const int64_t size = type == FLOAT32 ? 4 : 2;
  Rows rows(M, w);
  const Product product = {&w, &rows, 0, M};
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> wide(w.K);
#pragma omp for
    for (int64_t row = 0; row < M; row++) rows.put(wide_row(x, row * x_stride, w.K, type, wide.at), row, 0, M);
    multiply(&product, 1, [&](int64_t, int64_t row, int64_t R, int64_t panel, const float* sums) {
      const int64_t count = least(PANEL, w.N - panel * PANEL);
      for (int64_t r = 0; r < R; r++)
        write(sums + r * PANEL, (char*)out + ((row + r) * out_stride + panel * PANEL) * size, count, type);
    });
  }
}

// Whole numbers of steps, from low to high, with -low rounded up to a power of two added; low for NaN.
void codes(const float* __restrict from, int64_t count, float step, float low, float high, uint8_t* __restrict to) {
  const int32_t added = low < -8 ? 128 : 8;
  for (int64_t k = 0; k < count; k++) {
    const float whole = std::rint(from[k] / step), inside = whole > low ? whole < high ? whole : high : low;
    to[k] = (uint8_t)((int32_t)inside + added);
  }
}

// One output of a panel: its scales, and its inputs as they are stored. room: for K codes.
void pack_output(const float* w, int64_t n, const Weight& to, uint8_t* cells, float* scale, uint8_t* room) {
  const float low = to.bits == 8 ? -127 : -8, high = to.bits == 8 ? 127 : 7;
  for (int64_t g = 0; g < to.K / to.group; g++) {
    const float most = largest_magnitude(w + g * to.group, to.group), step = (most < 1e-6f ? 1e-6f : most) / -low;
    scale[(n / PANEL * (to.K / to.group) + g) * PANEL + n % PANEL] = step;
    codes(w + g * to.group, to.group, step, low, high, room + g * to.group);
  }
  const int64_t inputs = to.bits == 8 ? 4 : 8;
  for (int64_t k = 0; k < to.K; k += inputs) {
    uint32_t cell = four_bytes(room + k);
    if (to.bits == 4) cell |= four_bytes(room + k + 4) << 4;
    std::memcpy(cells + (k / inputs * PANEL + n % PANEL) * 4, &cell, 4);
  }
}

void pack(const void* w, Type type, Weight& to, int64_t threads) {
  uint8_t* packed = (uint8_t*)to.packed;
  float* scale = (float*)to.scale;
#pragma omp parallel num_threads(threads)
  {
    Buffer<uint8_t> room(to.K);
    Buffer<float> wide(to.K);
#pragma omp for
    for (int64_t panel = 0; panel < panels(to.N); panel++) {
      uint8_t* cells = packed + panel * PANEL * to.K * to.bits / 8;
      if (panel == to.N / PANEL)  // outputs that are not there
        std::memset(cells, to.bits == 8 ? 128 : to.bits == 4 ? 0x88 : 0, PANEL * to.K * to.bits / 8);
      for (int64_t n = panel * PANEL; n < least(to.N, (panel + 1) * PANEL); n++) {
        const float* row = wide_row(w, n * to.K, to.K, type, wide.at);
        if (to.bits == 16)
          for (int64_t k = 0; k < to.K; k++) ((uint16_t*)cells)[(k / 2 * PANEL + n % PANEL) * 2 + k % 2] = narrow(row[k]);
        else
          pack_output(row, n, to, cells, scale, room.at);
      }
    }
  }
}

}  // namespace

extern const Linear HERD_NAME(linear);
const Linear HERD_NAME(linear) = linear;
extern const Pack HERD_NAME(pack);
const Pack HERD_NAME(pack) = pack;

}  // namespace herd
