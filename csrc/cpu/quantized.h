// Products of rows with a packed weight in int8: each row of x is quantised by its own largest value, sums of whole
// numbers are exact, and scales come last. What is computed, and where it is rounded, is what
// vllm_omni/layers/quantization.py says in torch.
#pragma once

#include "elementwise.h"
#include "gemm.h"
#include "team.h"

#include <immintrin.h>

namespace omni {

// To the nearest whole number, ties to even.
inline IntVec nearest(Vec x) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#else
  return (IntVec)_mm256_cvtps_epi32((__m256)x);
#endif
}

// x, of which the compiler makes no fused product and sum.
inline Vec rounded_product(Vec x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#else
  asm("" : "+x"(x));
#endif
  return x;
}

// Rows of x in int8, each with its scale and the sum of its numbers.
struct QuantizedRows {
  SpreadRows<int8_t> numbers;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  void reserve(int64_t rows, int64_t inputs) {
    numbers.reserve(rows, inputs), scales.resize(size_t(rows)), sums.resize(size_t(rows));
  }
};

// One row; NaN or infinity in it makes its scale NaN. `size` is a multiple of four.
template <typename T>
inline void quantize_row(const T* x, int64_t size, int8_t* numbers, float* scale, int32_t* sum) {
  const int64_t whole = size / kWidth * kWidth;
  Vec most{}, odd{};
  for (int64_t i = 0; i < whole; i += kWidth) {
    const Vec v = load(x + i);
    most = max(max(most, v), -v);
    odd += v - v;
  }
  float all = largest(most) + omni::sum(odd);
  for (int64_t i = whole; i < size; i++) {
    const float v = load_one(x + i);
    all = std::max(all, std::fabs(v)) + (v - v);
  }
  float inverse = 127.0f / all;
  if (!std::isfinite(inverse)) inverse = 0;
  IntVec total{};
  for (int64_t i = 0; i < whole; i += kWidth) {
    const IntVec n = nearest(load(x + i) * inverse);
    const ByteVec bytes = __builtin_convertvector(n, ByteVec);
    std::memcpy(numbers + i, &bytes, sizeof(bytes));
    total += n;
  }
  int32_t found = 0;
  for (int i = 0; i < kWidth; i++) found += total[i];
  for (int64_t i = whole; i < size; i++) {
    numbers[i] = int8_t(_mm_cvtss_si32(_mm_set_ss(load_one(x + i) * inverse)));
    found += numbers[i];
  }
  *scale = all / 127.0f;
  *sum = found;
}

// Sums of kRows rows with one panel, in which 128 times the sum of a row is too much where `kIsShifted`.
#if defined(__AVX512VNNI__)
constexpr bool kIsShifted = true;  // one factor of the instruction has no sign

template <int kRows>
inline void multiply_panel(const int8_t* x, int64_t stride, const int8_t* panel, int64_t inputs,
                           IntVec (&sums)[kRows][kVectors]) {
  const __m512i shift = _mm512_set1_epi8(-128);
  for (int64_t k = 0; k < inputs; k += 4, panel += 4 * kPanel) {
    read_ahead<cache_for(kRows)>(panel);
    __m512i w[kVectors];
    for (int v = 0; v < kVectors; v++) w[v] = _mm512_loadu_si512(panel + 4 * v * kWidth) ^ shift;
    for (int r = 0; r < kRows; r++) {
      int32_t step;
      std::memcpy(&step, x + r * stride + k, sizeof(step));
      const __m512i all = _mm512_set1_epi32(step);
      for (int v = 0; v < kVectors; v++) sums[r][v] = (IntVec)_mm512_dpbusd_epi32((__m512i)sums[r][v], w[v], all);
    }
  }
}
#else
constexpr bool kIsShifted = false;

// |w| (x with the sign of w): pairs of products are at most 2 * 128 * 127, so that no sum of 16 bits is cut.
template <int kRows>
inline void multiply_panel(const int8_t* x, int64_t stride, const int8_t* panel, int64_t inputs,
                           IntVec (&sums)[kRows][kVectors]) {
  static_assert(kWidth == 8, "AVX2");
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t k = 0; k < inputs; k += 4, panel += 4 * kPanel)
    for (int v = 0; v < kVectors; v++) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 4 * v * kWidth));
      const __m256i size = _mm256_abs_epi8(w);
      for (int r = 0; r < kRows; r++) {
        int32_t step;
        std::memcpy(&step, x + r * stride + k, sizeof(step));
        const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(step), w));
        sums[r][v] += (IntVec)_mm256_madd_epi16(pairs, ones);
      }
    }
}
#endif

// Exact sums of rows to those of the product. shift: of the sums of a row, what is too much; first: of the rows.
template <typename Take>
struct TakeExact {
  const Take& take;
  const float* weight_scales;  // of the panel
  const QuantizedRows& x;
  int64_t first;
  int32_t shift;

  void operator()(int64_t row, int64_t i, IntVec exact) const {
    const Vec sum = __builtin_convertvector(exact - shift * x.sums[size_t(first + row)], Vec);
    take(row, i, rounded_product(sum * rounded_product(x.scales[size_t(first + row)] * load(weight_scales + i))));
  }
};

// The rows from `first` on with one panel.
template <typename T, typename Take>
inline void compute_panel(const QuantizedRows& x, int64_t first, int64_t rows, const Linear<T>& linear, int64_t panel,
                          const Take& take) {
  const int64_t inputs = linear.inputs, stride = x.numbers.stride;
  const int8_t* weight = static_cast<const int8_t*>(linear.weight) + panel * kPanel * inputs;
  const int8_t* numbers = x.numbers.row(first);
  const float* scales = linear.scales + panel * kPanel;
#if defined(OMNI_TILES)
  if (inputs % kTileBytes == 0) {
    const TakeExact<Take> take_exact{take, scales, x, first, 0};
    multiply_panel_by_tiles(numbers, stride, rows, inputs, weight, [&](const int32_t* sums, int64_t begin, int64_t count) {
      for (int64_t row = 0; row < count; row++)
        for (int64_t i = 0; i < kPanel; i += kWidth) {
          IntVec exact;
          std::memcpy(&exact, sums + row * kPanel + i, sizeof(exact));
          take_exact(begin + row, i, exact);
        }
    });
    return;
  }
#endif
  const TakeExact<Take> take_exact{take, scales, x, first, kIsShifted ? 128 : 0};
  in_passes(rows, [&](int64_t row, auto number) {
    IntVec exact[number.value][kVectors] = {};
    multiply_panel<number.value>(numbers + row * stride, stride, weight, inputs, exact);
    for (int r = 0; r < number.value; r++)
      for (int v = 0; v < kVectors; v++) take_exact(row + r, v * kWidth, exact[r][v]);
  });
}

// x [rows, inputs], rows `stride` elements apart, as either kind of weight is multiplied with it.
template <typename T>
struct Factor {
  const T* x;
  int64_t stride, rows;
  QuantizedRows& quantized;

  // Before panels of such a weight are computed; by every thread of a team.
  void prepare(Team& team, const Linear<T>& linear) const {
    if (!linear.scales) return;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++)
      quantize_row(x + row * stride, linear.inputs, quantized.numbers.row(row), &quantized.scales[size_t(row)],
                   &quantized.sums[size_t(row)]);
    team.meet();
  }

  template <typename Take>
  void compute(const Linear<T>& linear, int64_t panel, int64_t first, int64_t count, const Take& take) const {
    if (linear.scales)
      compute_panel(quantized, first, count, linear, panel, take);
    else
      compute_panel(x + first * stride, stride, count, linear, panel, take);
  }
};

// x -> out [rows, outputs], rows `stride` elements apart. To be called by every thread of a team, which shares the panels.
template <typename T>
void project(Team& team, const Factor<T>& x, const Linear<T>& linear, T* out, int64_t stride, const T* residual = nullptr) {
  x.prepare(team, linear);
  share_panels(x.rows, linear.outputs, [&](int64_t panel, int64_t row, int64_t count) {
    const int64_t at = row * stride + panel * kPanel;
    const Finish<T> finish{linear, panel, out + at, stride, residual ? residual + at : nullptr};
    x.compute(linear, panel, row, count, finish);
  });
}

// silu(gate) * up of a product [gate, up] of two whole numbers of panels -> out [rows, outputs / 2], rows `out_stride`
// elements apart. A panel of each are computed one after the other, so that neither is written to memory as a whole.
template <typename T>
void project_gated(Team& team, const Factor<T>& x, const Linear<T>& linear, T* out, int64_t out_stride) {
  const int64_t width = linear.outputs / 2;
  x.prepare(team, linear);
  share_panels(x.rows, width, [&](int64_t panel, int64_t first, int64_t count) {
    alignas(64) thread_local T both[kRowsInCache * 2 * kPanel];  // of each row a panel of gates and one of ups
    for (int64_t half = 0; half < 2; half++) {
      const int64_t its = panel + half * width / kPanel;
      x.compute(linear, its, first, count, Finish<T>{linear, its, both + half * kPanel, 2 * kPanel, nullptr});
    }
    for (int64_t row = 0; row < count; row++) {
      const T* gates = both + row * 2 * kPanel;
      gate_row(gates, gates + kPanel, kPanel, out + (first + row) * out_stride + panel * kPanel);
    }
  });
}

// x [rows, inputs] -> out [rows, outputs], or what `project_gated` makes of them, by a team of its own. Rows that crowd are
// spread if they pass more than once.
template <typename T>
void multiply_all(const T* x, int64_t rows, const Linear<T>& linear, bool is_gated, T* out, int threads) {
  constexpr int64_t kCrowding = 4096;  // bytes: rows so far apart share one of the nearest cache's 64 sets
  Team team;
  QuantizedRows quantized;
  SpreadRows<T> spread;
  const bool is_spread = !linear.scales && rows > kMostRows && linear.inputs * int64_t(sizeof(T)) % kCrowding == 0;
  if (linear.scales) quantized.reserve(rows, linear.inputs);
  if (is_spread) spread.reserve(rows, linear.inputs);
#pragma omp parallel num_threads(threads)
  {
    if (is_spread) {
      spread.fill(x, rows, linear.inputs);
      team.meet();
    }
    const Factor<T> factor{is_spread ? spread.row(0) : x, is_spread ? spread.stride : linear.inputs, rows, quantized};
    is_gated ? project_gated(team, factor, linear, out, linear.outputs / 2)
             : project(team, factor, linear, out, linear.outputs);
  }
}

}  // namespace omni
