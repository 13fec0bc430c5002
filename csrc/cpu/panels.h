// What a packed weight is read by; how it is packed, gemm.h says.
#pragma once

#include <cstdint>

namespace omni {

constexpr int kPanel = 32;       // rows of a weight that stand side by side
constexpr int64_t kLine = 64;    // bytes of a cache line

// Which cache something is asked for into, as __builtin_prefetch has it.
constexpr int kNearestCache = 3, kSecondCache = 2;

// For a weight that is multiplied with so many rows: where reading is most of the work, the nearest; else the second, since
// the nearest waits for few lines at once, and products would wait with it.
constexpr int cache_for(int rows) { return rows > 4 ? kSecondCache : kNearestCache; }

// Asks for two lines of a weight before they are multiplied: what the processor itself foresees ends with a page of 4 KiB,
// so that memory would rest. Panels stand one behind the other, and behind the last nothing is read in fact.
template <int kCache>
inline void read_ahead(const void* weight) {
  const char* from = static_cast<const char*>(weight) + 8192;
  __builtin_prefetch(from, 0, kCache);
  __builtin_prefetch(from + kLine, 0, kCache);
}

}  // namespace omni
