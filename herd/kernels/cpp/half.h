// Numbers in bfloat16, as plain code that compilers turn into vector code.
#pragma once
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

}  // namespace
}  // namespace herd
