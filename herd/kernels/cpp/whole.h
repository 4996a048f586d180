// Numbers as whole ones of one byte, as plain code that compilers turn into vector code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace herd {
namespace {

// The largest absolute value; NaN if there is one. As integers, where infinity and then NaN are the largest.
inline float largest_magnitude(const float* x, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float found;
  std::memcpy(&found, &most, 4);
  return found;
}

// How numbers of at most this magnitude become whole ones: x * inverse, at most 127, which stands for that times step.
// Numbers too small for that are 0; with an infinite one or NaN, step is NaN and nothing can become whole.
struct Steps {
  float inverse, step;
  bool finite;
  explicit Steps(float most) : inverse(127 / most), step(most / 127), finite(most <= 3.4028234e38f) {
    if (!finite) step = most * 0;
    if (!(inverse <= 3.4028234e38f)) inverse = 0;
  }
  // Only if finite: a check here instead would keep compilers from making vectors of it.
  float whole(float x) const { return std::rint(x * inverse); }
  // What is missing, in steps 254 times as small.
  float rest(float x) const { return std::rint((x * inverse - whole(x)) * 254); }
};

}  // namespace
}  // namespace herd
