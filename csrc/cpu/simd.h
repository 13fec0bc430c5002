// Vectors of float32 as wide as the instruction set that this is compiled for, and the element types of tensors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace omni {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#else
constexpr int kWidth = 8;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kWidth * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kWidth * 2)));
typedef int8_t ByteVec __attribute__((vector_size(kWidth)));

struct bfloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline Vec load(const bfloat16* from) {
#if defined(__AVX512BF16__)  // one instruction, where the compiler would widen halves of a vector and join them
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return bit_cast<Vec>((BitVec)_mm512_maskz_cvtepu16_epi32(0xffff, bits) << 16);
#else
  HalfVec bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bit_cast<Vec>(__builtin_convertvector(bits, BitVec) << 16);
#endif
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof(x)); }

// To the nearest, ties to even, as torch rounds; NaN stays NaN.
inline BitVec round_bits(Vec x) {
  const BitVec bits = bit_cast<BitVec>(x);
  const BitVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitVec is_nan = bit_cast<BitVec>(x != x);
  return (rounded & ~is_nan) | (is_nan & 0x7fc0u);
}

inline void store(bfloat16* to, Vec x) {
#if defined(__AVX512BF16__)
  const __m256bh bits = _mm512_cvtneps_pbh((__m512)x);
#else
  const HalfVec bits = __builtin_convertvector(round_bits(x), HalfVec);
#endif
  std::memcpy(to, &bits, sizeof(bits));
}

inline int32_t load_one(const int8_t* from) { return *from; }
inline float load_one(const float* from) { return *from; }
inline float load_one(const bfloat16* from) { return bit_cast<float>(uint32_t(from->bits) << 16); }
inline void store_one(float* to, float x) { *to = x; }
inline void store_one(bfloat16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// What a tensor of this element type would hold of x.
template <typename T>
inline Vec rounded(Vec x);
template <>
inline Vec rounded<float>(Vec x) { return x; }
template <>
inline Vec rounded<bfloat16>(Vec x) {
  bfloat16 held[kWidth];
  store(held, x);
  return load(held);
}

template <typename T>
inline float rounded_one(float x) {
  T held;
  store_one(&held, x);
  return load_one(&held);
}

inline Vec select(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }

inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }

// e^x by 2^n p(r), r in [-ln 2 / 2, ln 2 / 2], p the Taylor polynomial of degree 7: about one unit in the last place.
// 0 below the smallest normal number, infinity beyond the largest; NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec clamped = select(x < -87.3f, splat(-87.3f), select(x > 88.7f, splat(88.7f), x));
  const Vec shifted = clamped * 1.44269504089f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded product
  const Vec n = shifted - 12582912.0f;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors: n may be 128, whose power is no float
  const IntVec half = bit_cast<IntVec>(shifted) - 0x4b400000;
  const IntVec low = half >> 1, high = half - low;
  const Vec power = p * bit_cast<Vec>((low + 127) << 23) * bit_cast<Vec>((high + 127) << 23);
  const Vec bounded = select(x < -87.3f, splat(0.0f), select(x > 88.7f, splat(INFINITY), power));
  return select(x != x, x, bounded);
}

// The same for x up to 0 and with a polynomial of degree 6, about two units: -infinity is as -87.3, the rest as it is.
inline Vec exp_below_one(Vec x) {
  const Vec clamped = select(x < -87.3f, splat(-87.3f), x);
  const Vec shifted = clamped * 1.44269504089f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bit_cast<Vec>((bit_cast<IntVec>(shifted) - 0x4b400000 + 127) << 23);
}

// x[0..count) = y * x, where count is a multiple of kWidth.
inline void scale(float* x, int64_t count, float by) {
  for (int64_t i = 0; i < count; i += kWidth) store(x + i, load(x + i) * by);
}

// rows[i][j] and rows[j][i] change places: blocks of half the size at each turn (J. O. Eklundh, 1972).
inline void transpose(BitVec (&rows)[kWidth]) {
  for (int size = kWidth / 2; size > 0; size /= 2) {
    IntVec low, high;
    for (int j = 0; j < kWidth; j++) {
      low[j] = j & size ? kWidth + j - size : j;
      high[j] = j & size ? kWidth + j : j + size;
    }
    for (int i = 0; i < kWidth; i++)
      if (!(i & size)) {
        const BitVec a = rows[i], b = rows[i + size];
        rows[i] = __builtin_shuffle(a, b, bit_cast<BitVec>(low));
        rows[i + size] = __builtin_shuffle(a, b, bit_cast<BitVec>(high));
      }
  }
}

// [place(0), place(1), ...], which the compiler must know: numbers put in one by one cost more than what they are for.
template <typename Place, int... kAt>
inline IntVec places(Place place, std::integer_sequence<int, kAt...>) {
  return IntVec{place(kAt)...};
}
template <typename Place>
inline IntVec places(Place place) {
  return places(place, std::make_integer_sequence<int, kWidth>{});
}

// Halves are joined until one number is left.
template <int kDistance = kWidth / 2, typename Join>
inline float join(Vec x, Join join_two) {
  if constexpr (kDistance == 0)
    return x[0];
  else
    return join<kDistance / 2>(join_two(x, __builtin_shuffle(x, places([](int i) { return i ^ kDistance; }))), join_two);
}

inline float sum(Vec x) {
  return join(x, [](Vec a, Vec b) { return a + b; });
}

inline float largest(Vec x) { return join(x, max); }

}  // namespace omni
