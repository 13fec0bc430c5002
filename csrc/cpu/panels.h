// What a packed weight is read by; how it is packed, gemm.h says.
#pragma once

#include <cstdint>

namespace omni {

constexpr int kPanel = 32;       // rows of a weight that stand side by side
constexpr int64_t kLine = 64;    // bytes of a cache line

// Asks for two lines of a weight before they are multiplied with kRows rows: what the processor itself foresees ends with a
// page of 4 KiB, so that memory would rest. Where reading is most of the work they come into the nearest cache; else into
// the second, since the nearest waits for few lines at once, and products would wait with it. Panels stand one behind the
// other, and behind the last nothing is read in fact.
template <int kRows>
inline void read_ahead(const void* weight) {
  constexpr int64_t kDistance = 8192;
  constexpr int kFewRows = 4, kNearest = 3, kSecond = 2;
  const char* from = static_cast<const char*>(weight) + kDistance;
  for (int64_t line = 0; line < 2; line++) __builtin_prefetch(from + line * kLine, 0, kRows > kFewRows ? kSecond : kNearest);
}

}  // namespace omni
