// What a packed weight is read by; how it is packed, gemm.h says.
#pragma once

namespace omni {

constexpr int kPanel = 32;  // rows of a weight that stand side by side

// Asks for a weight's bytes before they are multiplied: what the processor itself foresees ends with a page of 4 KiB, so
// that memory rests while several rows are computed. Panels stand one behind the other, and behind the last nothing is
// read in fact.
inline void read_ahead(const void* weight) { __builtin_prefetch(static_cast<const char*>(weight) + 8192); }

}  // namespace omni
