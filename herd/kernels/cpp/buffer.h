// Memory for one call, and small helpers. Not from the standard library: its templates would be shared between the instruction sets.
#pragma once
#include <cstdint>
#include <cstdlib>
#if defined(_OPENMP)
#include <omp.h>
#endif

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
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Threads of the team that calls this.
inline int64_t team_size() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

}  // namespace
}  // namespace herd
