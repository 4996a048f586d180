// Numbers of 16 bits, bfloat16 (narrow, widen) and float16, as plain code that compilers turn into vector code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace herd {
namespace {

inline float widen(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t narrow(float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 64;
  return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

inline float from_half(uint16_t h) {  // finite numbers; without branches
  const uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  return (h & 0x8000 ? -0x1p112f : 0x1p112f) * x;
}

inline uint16_t to_half(float x) {  // to the nearest, ties to even
  const float size = std::fabs(x);
  uint32_t bits;
  std::memcpy(&bits, &size, 4);
  uint32_t half = ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10);
  if (size < 0x1p-14f) half = (uint32_t)std::rint(size * 0x1p24f);
  if (bits > 0x47800000) half = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  return (uint16_t)(half | (std::signbit(x) ? 0x8000 : 0));
}

}  // namespace
}  // namespace herd
