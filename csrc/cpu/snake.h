// The periodic activation of vocoders, x + amplitude * sin(frequency * x)^2 with both by channel, in float32.
#pragma once

#include "diffusion.h"

namespace omni {

// sin(x)^2, which repeats after pi: by a Taylor polynomial over a half turn to each side. NaN stays NaN; an x so large
// that whole turns cannot be told apart gives 0.
inline Vec squared_sine(Vec x) {
  const Vec shifted = x * 0.318309886f + 12582912.0f;  // as in exp: the rounded product
  const Vec n = shifted - 12582912.0f;
  const Vec left = ((x - n * 3.140625f) - n * 9.67502593994140625e-4f) - n * 1.509957990978376e-7f;
  const Vec r = select(x * x > 1e12f, x * 0.0f, left), square = r * r;
  Vec p = splat(-1.0f / 39916800);
  p = p * square + 1.0f / 362880;
  p = p * square - 1.0f / 5040;
  p = p * square + 1.0f / 120;
  p = p * square - 1.0f / 6;
  const Vec sine = r + r * square * p;
  return sine * sine;
}

// x, out: [outer, channels, inner]; frequency, amplitude: [channels]. To be called by every thread of a team, which
// shares the work.
template <typename T>
void snake(const T* x, const T* frequency, const T* amplitude, int64_t outer, int64_t channels, int64_t inner, T* out) {
  constexpr int64_t kPiece = 4096;
  const int64_t pieces = inner == 1 ? 1 : (inner + kPiece - 1) / kPiece, rows = inner == 1 ? outer : outer * channels;
  const int64_t size = inner == 1 ? channels : inner;
#pragma omp for schedule(static) nowait
  for (int64_t task = 0; task < rows * pieces; task++) {
    const int64_t row = task / pieces, begin = task % pieces * kPiece, channel = row % channels;
    const int64_t stop = inner == 1 || begin + kPiece > size ? size : begin + kPiece;
    for (int64_t i = begin; i < stop; i += kWidth) {
      const Vec by = inner == 1 ? load_within(frequency, i, stop) : splat(load_one(frequency + channel));
      const Vec size_of_wave = inner == 1 ? load_within(amplitude, i, stop) : splat(load_one(amplitude + channel));
      const Vec from = load_within(x + row * size, i, stop);
      store_within(out + row * size, from + size_of_wave * squared_sine(from * by), i, stop);
    }
  }
}

}  // namespace omni
