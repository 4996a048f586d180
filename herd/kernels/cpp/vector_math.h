// Parts of a softmax, as plain loops that compilers turn into vector code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace herd {
namespace {

constexpr float LOWEST = -1e30f;  // a logit that counts nothing

// exp(x) for x <= 0, to 2 units in the last place, and NaN for NaN; plain code, so that the compiler makes vectors of it.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  float n = std::rint(x * 1.44269504f);
  n = n > -126.0f ? n : -126.0f;  // NaN is no integer
  n = n < 0.0f ? n : 0.0f;        // beside NaN, the largest is not always found
  const float f = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return (p * f * f + f + 1.0f) * power;
}

// Log of the sum of two numbers whose logs these are.
inline float log_add(float a, float b) {
  const float top = a > b ? a : b;
  return top + std::log(std::exp(a - top) + std::exp(b - top));
}

// x becomes exp(x - most); returns the sum.
inline float exponentials(float* x, int64_t count, float most) {  // count is a multiple of 16
  float sums[16] = {};
  for (int64_t n = 0; n < count; n += 16)
    for (int i = 0; i < 16; i++) sums[i] += x[n + i] = exponential(x[n + i] - most);
  float sum = 0;
  for (int i = 0; i < 16; i++) sum += sums[i];
  return sum;
}

}  // namespace
}  // namespace herd
