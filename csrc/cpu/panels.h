// What a packed weight is read by; how it is packed, gemm.h says.
#pragma once

#include <cstdint>

namespace omni {

constexpr int kPanel = 32;       // rows of a weight that stand side by side
constexpr int64_t kLine = 64;    // bytes of a cache line

// Asks for a weight's bytes before they are multiplied: what the processor itself foresees ends with a page of 4 KiB, so
// that memory rests while several rows are computed. Panels stand one behind the other, and behind the last nothing is
// read in fact.
inline void read_ahead(const void* weight) { __builtin_prefetch(static_cast<const char*>(weight) + 8192); }

// What is asked for with each step of a panel, which is two lines.
struct Near {
  void ask(const void* step) {
    read_ahead(step);
    read_ahead(static_cast<const char*>(step) + kLine);
  }
};

// Where a few passes of rows go over a panel, each of them asks for its share of the next panel: the first would otherwise
// wait for all that is read, and memory rest during the others.
class Share {
 public:
  static constexpr int64_t kMostPasses = 3;  // with more, multiplying takes longer than reading

  Share(const void* panel, int64_t bytes, int64_t pass, int64_t passes)
      : next_(static_cast<const char*>(panel) + bytes + pass * bytes / passes), step_(2 * kLine / passes) {}

  void ask(const void*) {
    __builtin_prefetch(next_);
    next_ += step_;
  }

 private:
  const char* next_;
  const int64_t step_;
};

}  // namespace omni
