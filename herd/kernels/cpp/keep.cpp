// Keys and values as a context keeps them: codes of 8 or 4 bits with a float16 scale for each token and head.
#include <cmath>

#include "half.h"
#include "levels.h"
#include "whole.h"

namespace herd {
namespace {

constexpr float SMALLEST = 0x1p-14f;  // normal number of float16
constexpr uint16_t INFINITE = 0x7c00;
constexpr float SCALES[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};  // as in reference.py

bool finite(uint16_t half) { return (half & 0x7fff) < INFINITE; }

float code(float x, float step, float low, float high) {
  const float whole = std::rint(x / step);
  return whole < low ? low : whole > high ? high : whole;
}

uint16_t keep_8(const float* x, int64_t d, uint8_t* codes) {
  const float step = largest_magnitude(x, d) / 127;
  const uint16_t scale = to_half(step < SMALLEST ? SMALLEST : step);
  if (!finite(scale)) {
    std::memset(codes, 0, d);
    return scale;
  }
  const float rounded = from_half(scale);
  for (int64_t i = 0; i < d; i++) codes[i] = (uint8_t)(int32_t)code(x[i], rounded, -127, 127);
  return scale;
}

float squared_error(const float* x, int64_t d, float step) {
  float lanes[16] = {}, sum = 0;
  int64_t i = 0;
  const auto squared = [&](int64_t at) {
    const float error = code(x[at], step, -8, 7) * step - x[at];
    return error * error;
  };
  for (; i + 16 <= d; i += 16)
    for (int j = 0; j < 16; j++) lanes[j] += squared(i + j);
  for (; i < d; i++) sum += squared(i);
  for (int j = 0; j < 16; j++) sum += lanes[j];
  return sum;
}

// The number furthest from 0; NaN if there is one.
float furthest(const float* x, int64_t d) {
  float found = x[0];
  for (int64_t i = 1; i < d; i++)
    if (std::fabs(x[i]) > std::fabs(found) || (x[i] != x[i] && found == found)) found = x[i];
  return found;
}

uint16_t keep_4(const float* x, int64_t d, uint8_t* codes) {
  const float far = furthest(x, d);
  uint16_t scale = to_half(far);
  float step = 0, least = INFINITY;
  for (const float share : SCALES) {
    uint16_t tried = to_half(far * (share / -8));
    if (!finite(tried)) continue;
    if (std::fabs(from_half(tried)) < SMALLEST) tried = to_half(SMALLEST);
    const float error = squared_error(x, d, from_half(tried));
    if (error < least) scale = tried, step = from_half(tried), least = error;
  }
  for (int64_t i = 0; i < d / 2; i++) {
    const float low = step == 0 ? 0 : code(x[i], step, -8, 7), high = step == 0 ? 0 : code(x[d / 2 + i], step, -8, 7);
    codes[i] = (uint8_t)(((int32_t)low + 8) | ((int32_t)high + 8) << 4);
  }
  return scale;
}

void keep(const float* x, int64_t rows, int64_t d, int32_t bits, uint8_t* codes, uint16_t* scale) {
  for (int64_t row = 0; row < rows; row++)
    scale[row] = (bits == 8 ? keep_8 : keep_4)(x + row * d, d, codes + row * d * bits / 8);
}

}  // namespace

extern const Keep HERD_NAME(keep);
const Keep HERD_NAME(keep) = keep;

}  // namespace herd
