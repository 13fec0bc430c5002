// The periodic activation of vocoders, x + amplitude * sin(frequency * x)^2 with both by channel, in float32; as it is, and
// at twice the rate between two filters.
#pragma once

#include <algorithm>

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

// Some numbers of one row at twice the rate. A filter has 12 taps: of a number between those of x it takes every second,
// the odd ones first.
struct DoubledPiece {
  static constexpr int64_t kNumbers = 1024, kTaps = 12, kHalf = kTaps / 2, kBeside = 3;  // that a filter reads to each side

  float x[kNumbers + 4 * kBeside + kWidth];
  float even[kNumbers + 2 * kBeside + kWidth], odd[kNumbers + 2 * kBeside + kWidth];

  // x[begin - 6, stop + 6) of a row of `length`, which stays beyond its ends as it is there.
  template <typename T>
  void read(const T* row, int64_t length, int64_t begin, int64_t stop) {
    for (int64_t i = 0; i < stop - begin + 4 * kBeside + kWidth; i++)
      x[i] = load_one(row + std::clamp<int64_t>(begin - 2 * kBeside + i, 0, length - 1));
  }

  // The numbers [begin - 3, stop + 3) of both halves, and beyond the ends of the row what its doubled ends are.
  void activate(const float* taps, float frequency, float amplitude, int64_t length, int64_t begin, int64_t stop) {
    const auto activated = [&](Vec x) { return x + amplitude * squared_sine(x * frequency); };
    for (int64_t i = 0; i < stop - begin + 2 * kBeside; i += kWidth) {
      Vec first{}, second{};
      for (int64_t tap = 0; tap < kHalf; tap++) {
        first += load(x + i + 5 - tap) * (2 * taps[2 * tap + 1]);
        second += load(x + i + 6 - tap) * (2 * taps[2 * tap]);
      }
      store(even + i, activated(first)), store(odd + i, activated(second));
    }
    const int64_t low = kBeside - begin, high = low + length - 1;
    for (int64_t i = 0; i < low; i++) even[i] = odd[i] = even[low];
    for (int64_t i = high + 1; i < stop - begin + 2 * kBeside; i++) even[i] = odd[i] = odd[high];
  }

  Vec halved(const float* taps, int64_t i) const {
    Vec sum{};
    for (int64_t tap = 0; tap < kHalf; tap++)
      sum += load(odd + i + tap) * taps[2 * tap] + load(even + i + 1 + tap) * taps[2 * tap + 1];
    return sum;
  }
};

// x, out: [outer, channels, length]; taps: [12], of both filters. To be called by every thread of a team.
template <typename T>
void filtered_snake(const T* x, const T* frequency, const T* amplitude, const float* taps, int64_t outer,
                    int64_t channels, int64_t length, T* out) {
  constexpr int64_t kNumbers = DoubledPiece::kNumbers;
  const int64_t pieces = (length + kNumbers - 1) / kNumbers;
  DoubledPiece piece;
#pragma omp for schedule(static) nowait
  for (int64_t task = 0; task < outer * channels * pieces; task++) {
    const int64_t row = task / pieces, channel = row % channels, begin = task % pieces * kNumbers;
    const int64_t stop = std::min(begin + kNumbers, length);
    piece.read(x + row * length, length, begin, stop);
    piece.activate(taps, load_one(frequency + channel), load_one(amplitude + channel), length, begin, stop);
    for (int64_t i = begin; i < stop; i += kWidth) store_within(out + row * length, piece.halved(taps, i - begin), i, stop);
  }
}

}  // namespace omni
