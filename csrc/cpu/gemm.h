// Products of rows with a packed weight. A weight [N, K] lies in panels of 32 of its rows: for each step of K the 32
// values of a panel stand side by side, four bytes of each (float32: one k a step, bfloat16: two, int8: four, as the
// dot-product instructions take them). N is a multiple of 32, and K one of a step. Every element of the product is summed
// over k in one order, whatever else is computed with it: a row's result does not depend on how many rows there are.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "elementwise.h"
#include "panels.h"
#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) || defined(OMNI_EMULATE_TILES)
#define OMNI_TILES
#include "tiles.h"
#endif

namespace omni {

constexpr int kVectors = kPanel / kWidth;        // of a panel's step
constexpr int kMostRows = kWidth == 16 ? 12 : 3;  // of x in one pass over a panel: what the registers hold
constexpr int64_t kRowsInCache = 512;            // of x while all panels pass by

template <typename T>
struct Linear {
  const void* weight;   // of T, or of int8_t where there are scales, or of bfloat16 where it is in halves
  const float* scales;  // of the outputs, or null; see quantized.h
  const T* bias;        // or null
  int64_t outputs, inputs;
  int32_t is_in_halves;  // beside x in float32
  int32_t has_gelu;      // which follows
};

// Elements from one row of x to the next, so that rows are an odd number of cache lines apart: those that are a power of
// two apart have the same few places in the nearest cache, and drive each other out.
template <typename T>
inline int64_t stride_of(int64_t inputs) {
  const int64_t lines = (inputs * int64_t(sizeof(T)) + kLine - 1) / kLine;
  return (lines | 1) * kLine / int64_t(sizeof(T));
}

// Rows of x with room between them; not filled at first.
template <typename T>
struct SpreadRows {
  std::unique_ptr<T[]> numbers;
  int64_t stride = 0;

  void reserve(int64_t rows, int64_t inputs) {
    stride = stride_of<T>(inputs);
    numbers.reset(new T[size_t(rows * stride)]);
  }

  T* row(int64_t index) { return numbers.get() + index * stride; }
  const T* row(int64_t index) const { return numbers.get() + index * stride; }

  // x [rows, inputs], by every thread of a team.
  void fill(const T* x, int64_t rows, int64_t inputs) {
#pragma omp for schedule(static) nowait
    for (int64_t index = 0; index < rows; index++)
      std::copy(x + index * inputs, x + (index + 1) * inputs, row(index));
  }
};

// The sums of kRows rows with one panel, float32. Nothing is asked for ahead: it costs what it gains.
template <int kRows>
inline void multiply_panel(const float* x, int64_t stride, const float* panel, int64_t inputs,
                           Vec (&sums)[kRows][kVectors]) {
  for (int64_t k = 0; k < inputs; k++, panel += kPanel) {
    Vec w[kVectors];
    for (int v = 0; v < kVectors; v++) w[v] = load(panel + v * kWidth);
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVectors; v++) sums[r][v] += x[r * stride + k] * w[v];
  }
}

// With a panel in bfloat16: its numbers are those of float32 whose lower half is zero, multiplied and added in the same
// order, so that the sums are the same to the last bit.
template <int kRows, typename T>
inline void multiply_panel(const T* x, int64_t stride, const bfloat16* panel, int64_t inputs,
                           Vec (&sums)[kRows][kVectors]) {
  const auto add = [&](int64_t k, const auto& widen) {
    Vec each[kRows];
    for (int r = 0; r < kRows; r++) each[r] = splat(load_one(x + r * stride + k));
    for (int v = 0; v < kVectors; v++) {
      BitVec pairs;
      std::memcpy(&pairs, panel + 2 * v * kWidth, sizeof(pairs));
      const Vec w = bit_cast<Vec>(widen(pairs));
      for (int r = 0; r < kRows; r++) sums[r][v] += each[r] * w;
    }
  };
  for (int64_t k = 0; k < inputs; k += 2, panel += 2 * kPanel) {
    read_ahead<cache_for(kRows)>(panel);
    add(k, [](BitVec pairs) { return pairs << 16; });
    add(k + 1, [](BitVec pairs) { return pairs & 0xffff0000u; });
  }
}

#if defined(__AVX512BF16__)
template <int kRows>
inline void multiply_panel(const bfloat16* x, int64_t stride, const bfloat16* panel, int64_t inputs,
                           Vec (&sums)[kRows][kVectors]) {
  for (int64_t k = 0; k < inputs; k += 2, panel += 2 * kPanel) {
    read_ahead<cache_for(kRows)>(panel);
    __m512bh w[kVectors];
    for (int v = 0; v < kVectors; v++) w[v] = (__m512bh)_mm512_loadu_si512(panel + 2 * v * kWidth);
    for (int r = 0; r < kRows; r++) {
      int32_t pair;
      std::memcpy(&pair, x + r * stride + k, sizeof(pair));
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < kVectors; v++) sums[r][v] = (Vec)_mm512_dpbf16_ps((__m512)sums[r][v], both, w[v]);
    }
  }
}
#endif

// Where the sums of rows with one panel go, rows of `out` that are `stride` elements apart; with `residual`, which is shaped
// as `out`, its sum with what the product is when it is rounded.
template <typename T>
struct Finish {
  const Linear<T>& linear;
  int64_t panel;
  T* out;
  int64_t stride;
  const T* residual;

  void operator()(int64_t row, int64_t i, Vec y) const {
    const int64_t at = row * stride + i;
    if (linear.bias) y += load(linear.bias + panel * kPanel + i);
    if (linear.has_gelu) y = gelu(rounded<T>(y));
    if (residual) y = rounded<T>(y) + load(residual + at);
    store(out + at, y);
  }
};

// Calls `work` with the number of rows as a constant.
template <int kRows, typename Work>
inline void with_rows(int64_t rows, const Work& work) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      work(std::integral_constant<int, kRows>{});
    else
      with_rows<kRows - 1>(rows, work);
  }
}

// Calls `work` with the first of some rows and their number as a constant, for passes that are as equal as can be.
template <typename Work>
inline void in_passes(int64_t rows, const Work& work) {
  const int64_t passes = (rows + kMostRows - 1) / kMostRows;
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t row = pass * rows / passes, stop = (pass + 1) * rows / passes;
    with_rows<kMostRows>(stop - row, [&](auto count) { work(row, count); });
  }
}

// Rows of x with one panel, in one pass after the other over its numbers; rows are `stride` elements apart. `take` is given
// a row, a column of the panel and the sums of kWidth columns, which have not left the registers then.
template <typename T, typename W, typename Take>
inline void pass_rows(const T* x, int64_t stride, int64_t rows, int64_t inputs, const W* panel, const Take& take) {
  in_passes(rows, [&](int64_t row, auto number) {
    Vec sums[number.value][kVectors] = {};
    multiply_panel<number.value>(x + row * stride, stride, panel, inputs, sums);
    for (int r = 0; r < number.value; r++)
      for (int v = 0; v < kVectors; v++) take(row + r, v * kWidth, sums[r][v]);
  });
}

// The same by tiles, where the processor has them.
template <typename T, typename Take>
inline void multiply_rows(const T* x, int64_t stride, int64_t rows, int64_t inputs, const T* panel, const Take& take) {
#if defined(OMNI_TILES)
  if constexpr (sizeof(T) == 2)
    if (inputs * int64_t(sizeof(T)) % kTileBytes == 0) {
      multiply_panel_by_tiles(x, stride, rows, inputs, panel, [&](const float* sums, int64_t first, int64_t count) {
        for (int64_t row = 0; row < count; row++)
          for (int64_t i = 0; i < kPanel; i += kWidth) take(first + row, i, load(sums + row * kPanel + i));
      });
      return;
    }
#endif
  pass_rows(x, stride, rows, inputs, panel, take);
}

// A panel in bfloat16 as one in float32.
inline void widen_panel(const bfloat16* panel, int64_t inputs, float* to) {
  for (int64_t k = 0; k < inputs; k += 2, panel += 2 * kPanel, to += 2 * kPanel)
    for (int v = 0; v < kVectors; v++) {
      BitVec pairs;
      std::memcpy(&pairs, panel + 2 * v * kWidth, sizeof(pairs));
      store(to + v * kWidth, bit_cast<Vec>(pairs << 16));
      store(to + kPanel + v * kWidth, bit_cast<Vec>(pairs & 0xffff0000u));
    }
}

// A panel in bfloat16 beside rows in float32, which is widened once where many passes read it.
template <typename Take>
inline void multiply_rows_in_halves(const float* x, int64_t stride, int64_t rows, int64_t inputs, const bfloat16* panel,
                                    const Take& take) {
  constexpr int64_t kFewPasses = 2;
  thread_local std::vector<float> wide;  // kept: its pages would be cleared anew for every panel
  if (rows <= kFewPasses * kMostRows) {
    pass_rows(x, stride, rows, inputs, panel, take);
    return;
  }
  if (int64_t(wide.size()) < kPanel * inputs) wide.resize(size_t(kPanel * inputs));
  widen_panel(panel, inputs, wide.data());
  pass_rows(x, stride, rows, inputs, static_cast<const float*>(wide.data()), take);
}

// Rows of the product with one panel; x: rows that are `stride` elements apart. take: as of `pass_rows`.
template <typename T, typename Take>
inline void compute_panel(const T* x, int64_t stride, int64_t rows, const Linear<T>& linear, int64_t panel,
                          const Take& take) {
  const int64_t before = panel * kPanel * linear.inputs;
  if constexpr (sizeof(T) == 4)
    if (linear.is_in_halves) {
      multiply_rows_in_halves(x, stride, rows, linear.inputs, static_cast<const bfloat16*>(linear.weight) + before, take);
      return;
    }
  multiply_rows(x, stride, rows, linear.inputs, static_cast<const T*>(linear.weight) + before, take);
}

// Calls `work` with each panel and some of the rows, by one thread of a team each; blocks of rows are as equal as can be,
// so that the threads' shares are.
template <typename Work>
inline void share_panels(int64_t rows, int64_t outputs, const Work& work) {
  const int64_t panels = outputs / kPanel, blocks = (rows + kRowsInCache - 1) / kRowsInCache;
#pragma omp for schedule(static) nowait
  for (int64_t task = 0; task < panels * blocks; task++) {
    const int64_t block = task / panels, row = block * rows / blocks;
    work(task % panels, row, (block + 1) * rows / blocks - row);
  }
}

// [outputs, inputs] -> panels, each in the place of its rows.
template <typename T>
void pack(T* weight, int64_t outputs, int64_t inputs) {
  constexpr int step = 4 / sizeof(T);
  std::vector<T> rows(size_t(kPanel * inputs));
#pragma omp for schedule(static) nowait
  for (int64_t panel = 0; panel < outputs / kPanel; panel++) {
    T* to = weight + panel * kPanel * inputs;
    std::copy(to, to + kPanel * inputs, rows.begin());
    for (int64_t k = 0; k < inputs; k += step)
      for (int64_t i = 0; i < kPanel; i++)
        for (int64_t s = 0; s < step; s++) *to++ = rows[size_t(i * inputs + k + s)];
  }
}

// Rows of a packed weight as they were published: ids [rows] -> out [rows, inputs].
template <typename T>
void unpack_rows(const T* packed, int64_t inputs, const int64_t* ids, int64_t rows, T* out) {
  constexpr int step = 4 / sizeof(T);
#pragma omp for schedule(static) nowait
  for (int64_t row = 0; row < rows; row++) {
    const T* from = packed + ids[row] / kPanel * kPanel * inputs + ids[row] % kPanel * step;
    for (int64_t k = 0; k < inputs; k += step)
      for (int64_t s = 0; s < step; s++) out[row * inputs + k + s] = from[k * kPanel + s];
  }
}

}  // namespace omni
