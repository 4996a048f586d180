// Memory for one call. Not from the standard library: its templates would be shared between the instruction sets.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace herd {
namespace {

template <class T>
struct Buffer {
  T* at;
  explicit Buffer(int64_t count) : at((T*)std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)) {
    if (!at) std::abort();
  }
  ~Buffer() { std::free(at); }
  Buffer(const Buffer&) = delete;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace herd
