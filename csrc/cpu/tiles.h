// Products of bfloat16 or int8 by the tile units of a CPU (AMX), or by loops that do what these do, for tests elsewhere.
// The layout of a panel is that of a tile already: steps of k one under the other, each with four bytes a column.
#pragma once

#include <algorithm>
#include <type_traits>

#include "panels.h"
#include "simd.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace omni {

constexpr int64_t kTileRows = 16;     // of x in a tile, and columns of a panel
constexpr int64_t kTileBytes = 64;    // of k in a tile
constexpr int64_t kTilePassRows = 2 * kTileRows;

template <typename T>
using SumOf = std::conditional_t<sizeof(T) == 1, int32_t, float>;

// Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 columns of a panel.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes(int64_t upper, int64_t lower) {
    const int64_t counts[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
    for (int tile = 0; tile < 8; tile++) rows[tile] = uint8_t(counts[tile]), row_bytes[tile] = 64;
    if (lower == 0)
      for (int tile : {2, 3, 5}) row_bytes[tile] = 0;
  }
};
static_assert(sizeof(TileShapes) == 64, "as the processor reads it");

#if defined(__AMX_BF16__)

// Linux lets a process use tiles when it asks.
inline bool may_use_tiles() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0; }

struct Tiles {
  explicit Tiles(const TileShapes& shapes) { _tile_loadconfig(&shapes); }
  ~Tiles() { _tile_release(); }
  template <int kTile> void clear() { asm volatile("tilezero %%tmm%c0" ::"i"(kTile)); }
  template <int kTile> void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile> void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <typename T, int kSums, int kRows, int kColumns> void multiply() {
    if constexpr (sizeof(T) == 2)
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kColumns));
    else
      asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kColumns));
  }
};

#else

inline bool may_use_tiles() { return true; }

struct Tiles {
  TileShapes shapes;
  uint8_t held[8][kTileRows][64] = {};

  explicit Tiles(const TileShapes& shapes) : shapes(shapes) {}
  template <int kTile> void clear() { std::memset(held[kTile], 0, sizeof(held[kTile])); }
  template <int kTile> void load(const void* from, int64_t stride) {
    for (int row = 0; row < shapes.rows[kTile]; row++)
      std::memcpy(held[kTile][row], static_cast<const uint8_t*>(from) + row * stride, 64);
  }
  template <int kTile> void store(void* to, int64_t stride) {
    for (int row = 0; row < shapes.rows[kTile]; row++)
      std::memcpy(static_cast<uint8_t*>(to) + row * stride, held[kTile][row], 64);
  }
  template <typename T, int kSums, int kRows, int kColumns> void multiply() {
    for (int row = 0; row < shapes.rows[kSums]; row++)
      for (int column = 0; column < kTileRows; column++) {
        SumOf<T> sum, parts[4 / sizeof(T)] = {};
        std::memcpy(&sum, &held[kSums][row][column * 4], 4);
        for (int step = 0; step < shapes.rows[kColumns]; step++) {
          T x[4 / sizeof(T)], w[4 / sizeof(T)];
          std::memcpy(x, &held[kRows][row][step * 4], 4);
          std::memcpy(w, &held[kColumns][step][column * 4], 4);
          for (size_t i = 0; i < 4 / sizeof(T); i++) parts[i] += load_one(x + i) * load_one(w + i);
        }
        for (SumOf<T> part : parts) sum += part;
        std::memcpy(&held[kSums][row][column * 4], &sum, 4);
      }
  }
};

#endif

// Rows of x with one panel after the other. The tiles are set up once for all products of as many rows.
template <typename T>
class TileProduct {
  static_assert(kPanel == 2 * kTileRows, "two tiles a panel");
  static constexpr int64_t kInputs = kTileBytes / sizeof(T);  // of a tile
  static constexpr int64_t kSumsStride = kPanel * 4;

 public:
  // rows: at most kTilePassRows.
  explicit TileProduct(int64_t rows)
      : lower_(std::max<int64_t>(rows - kTileRows, 0)), tiles_(TileShapes(rows - lower_, lower_)) {}

  // x [rows, inputs], rows `stride` elements apart -> sums [rows, kPanel]. kReadsAhead: where the panel comes from memory,
  // to be read once.
  template <bool kReadsAhead>
  void multiply(const T* x, int64_t stride, int64_t inputs, const T* panel, SumOf<T>* sums) {
    const int64_t x_stride = stride * int64_t(sizeof(T));
    tiles_.template clear<0>(), tiles_.template clear<1>();
    if (lower_) tiles_.template clear<2>(), tiles_.template clear<3>();
    for (int64_t k = 0; k < inputs; k += kInputs, panel += kPanel * kInputs) {
      if constexpr (kReadsAhead)
        for (int64_t line = 0; line < 2 * kTileRows; line += 2) read_ahead<kNearestCache>(panel + line * kInputs);
      tiles_.template load<6>(panel, kPanel * 4), tiles_.template load<7>(panel + kInputs, kPanel * 4);
      tiles_.template load<4>(x + k, x_stride);
      tiles_.template multiply<T, 0, 4, 6>(), tiles_.template multiply<T, 1, 4, 7>();
      if (lower_) {
        tiles_.template load<5>(x + kTileRows * stride + k, x_stride);
        tiles_.template multiply<T, 2, 5, 6>(), tiles_.template multiply<T, 3, 5, 7>();
      }
    }
    tiles_.template store<0>(sums, kSumsStride), tiles_.template store<1>(sums + kTileRows, kSumsStride);
    if (lower_) {
      SumOf<T>* second = sums + kTileRows * kPanel;
      tiles_.template store<2>(second, kSumsStride), tiles_.template store<3>(second + kTileRows, kSumsStride);
    }
  }

 private:
  const int64_t lower_;  // rows behind the first kTileRows
  Tiles tiles_;
};

// Any number of rows with one panel; `finish` is given sums [count, kPanel], the first of their rows and how many they are.
// The first pass brings the panel from memory.
template <typename T, typename Finish>
inline void multiply_panel_by_tiles(const T* x, int64_t stride, int64_t rows, int64_t inputs, const T* panel,
                                    const Finish& finish) {
  alignas(64) SumOf<T> sums[kTilePassRows * kPanel];
  int64_t row = 0;
  const auto pass = [&](TileProduct<T>& product, int64_t count) {
    if (row == 0)
      product.template multiply<true>(x, stride, inputs, panel, sums);
    else
      product.template multiply<false>(x + row * stride, stride, inputs, panel, sums);
    finish(sums, row, count);
    row += count;
  };
  if (rows >= kTilePassRows)
    for (TileProduct<T> whole(kTilePassRows); row + kTilePassRows <= rows;) pass(whole, kTilePassRows);
  if (row < rows) {
    TileProduct<T> rest(rows - row);
    pass(rest, rows - row);
  }
}

}  // namespace omni
