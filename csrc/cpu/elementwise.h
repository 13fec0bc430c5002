// What stands between the products of a layer, rounded to the element type where the plain path rounds. To be called by
// every thread of a team, which shares the rows.
#pragma once

#include "simd.h"

namespace omni {

// 1 / rms(x), float32.
template <typename T>
inline float inverse_rms(const T* x, int64_t size, float epsilon) {
  Vec squares{};
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const Vec v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < size; i++) total += load_one(x + i) * load_one(x + i);
  return 1.0f / std::sqrt(total / float(size) + epsilon);
}

// x / rms(x), rounded, times weight; `out` may be x.
template <typename T>
inline void norm_row(const T* x, const T* weight, int64_t size, float epsilon, T* out) {
  const float scale = inverse_rms(x, size, epsilon);
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(out + i, rounded<T>(load(x + i) * scale) * load(weight + i));
  for (; i < size; i++) store_one(out + i, rounded_one<T>(load_one(x + i) * scale) * load_one(weight + i));
}

// out: rows `stride` elements apart.
template <typename T>
void norm(const T* x, const T* weight, int64_t rows, int64_t size, float epsilon, T* out, int64_t stride) {
#pragma omp for schedule(static) nowait
  for (int64_t row = 0; row < rows; row++) norm_row(x + row * size, weight, size, epsilon, out + row * stride);
}

// x * cos + (-second half, first half) * sin; `out` may not be x. Both products are rounded, then their sum.
template <typename T>
inline void rotate_row(const T* x, const T* cos, const T* sin, int64_t size, T* out) {
  const int64_t half = size / 2;
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const Vec real = load(x + i), imaginary = load(x + half + i);
    store(out + i, rounded<T>(real * load(cos + i)) - rounded<T>(imaginary * load(sin + i)));
    store(out + half + i, rounded<T>(imaginary * load(cos + half + i)) + rounded<T>(real * load(sin + half + i)));
  }
  for (; i < half; i++) {
    const float real = load_one(x + i), imaginary = load_one(x + half + i);
    store_one(out + i, rounded_one<T>(real * load_one(cos + i)) - rounded_one<T>(imaginary * load_one(sin + i)));
    store_one(out + half + i,
              rounded_one<T>(imaginary * load_one(cos + half + i)) + rounded_one<T>(real * load_one(sin + half + i)));
  }
}

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// By its tanh: x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vec gelu(Vec x) { return x / (1.0f + exp(x * (-1.5957691216f - 0.0713548163f * x * x))); }

template <typename T>
void gelu(const T* x, int64_t count, T* out) {
#pragma omp for schedule(static) nowait
  for (int64_t i = 0; i < count / kWidth; i++) store(out + i * kWidth, gelu(load(x + i * kWidth)));
#pragma omp single nowait
  for (int64_t i = count / kWidth * kWidth; i < count; i++) store_one(out + i, gelu(splat(load_one(x + i)))[0]);
}

// silu(gate) * up.
template <typename T>
inline void gate_row(const T* gates, const T* ups, int64_t size, T* out) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(out + i, rounded<T>(silu(load(gates + i))) * load(ups + i));
  for (; i < size; i++)
    store_one(out + i, rounded_one<T>(silu(splat(load_one(gates + i)))[0]) * load_one(ups + i));
}

// Of rows [gate, up] -> [rows, width], rows `stride` elements apart.
template <typename T>
void gate(const T* gate_up, int64_t rows, int64_t width, T* out, int64_t stride) {
  constexpr int64_t kPiece = 1024;
  const int64_t pieces = (width + kPiece - 1) / kPiece;
#pragma omp for schedule(static) nowait
  for (int64_t task = 0; task < rows * pieces; task++) {
    const int64_t row = task / pieces, begin = task % pieces * kPiece;
    const int64_t stop = begin + kPiece < width ? begin + kPiece : width;
    const T* gates = gate_up + row * 2 * width + begin;
    gate_row(gates, gates + width, stop - begin, out + row * stride + begin);
  }
}

}  // namespace omni
