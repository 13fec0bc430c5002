// What stands between the products of a diffusion transformer's layers, where each sample has its own scale, shift and
// gate. Rounded to the element type where the plain path rounds. To be called by every thread of a team, which shares
// the tokens.
#pragma once

#include "elementwise.h"

namespace omni {

// Neighbouring samples of equally many tokens, [samples * length, size].
struct Tokens {
  int64_t samples, length, size;

  int64_t count() const { return samples * length; }
};

// One vector [size] for each sample, `stride` numbers apart; or null.
template <typename T>
struct PerSample {
  const T* data;
  int64_t stride;

  const T* of(const Tokens& tokens, int64_t token) const {
    return data ? data + token / tokens.length * stride : nullptr;
  }
};

// Of every token by itself. weight: null of a layer norm, which takes the mean away first, and where there is no norm.
template <typename T>
struct Norm {
  const T* weight;
  float epsilon;
  int32_t centred;

  bool is_there() const { return weight || centred; }

  struct Moments {
    float mean, scale;
  };

  Moments moments(const T* x, int64_t size) const {
    if (!centred) return {0.0f, inverse_rms(x, size, epsilon)};
    Vec sums{};
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) sums += load(x + i);
    float total = sum(sums);
    for (; i < size; i++) total += load_one(x + i);
    const float mean = total / float(size);
    Vec squares{};
    for (i = 0; i + kWidth <= size; i += kWidth) {
      const Vec v = load(x + i) - mean;
      squares += v * v;
    }
    total = sum(squares);
    for (; i < size; i++) total += (load_one(x + i) - mean) * (load_one(x + i) - mean);
    return {mean, 1.0f / std::sqrt(total / float(size) + epsilon)};
  }
};

template <typename T>
inline Vec load_part(const T* from, int64_t count) {
  Vec x{};
  for (int64_t i = 0; i < count; i++) x[i] = load_one(from + i);
  return x;
}

template <typename T>
inline void store_part(T* to, Vec x, int64_t count) {
  for (int64_t i = 0; i < count; i++) store_one(to + i, x[i]);
}

// The numbers [at, at + kWidth) of a row of `size`, or those that it has.
template <typename T>
inline Vec load_within(const T* from, int64_t at, int64_t size) {
  return at + kWidth <= size ? load(from + at) : load_part(from + at, size - at);
}

template <typename T>
inline void store_within(T* to, Vec x, int64_t at, int64_t size) {
  if (at + kWidth <= size)
    store(to + at, x);
  else
    store_part(to + at, x, size - at);
}

// norm(x), of one token, as the element type holds it.
template <typename T>
inline Vec normed(const Norm<T>& norm, const typename Norm<T>::Moments& found, const T* x, int64_t at, int64_t size) {
  const Vec y = rounded<T>((load_within(x, at, size) - found.mean) * found.scale);
  return norm.weight ? rounded<T>(y * load_within(norm.weight, at, size)) : y;
}

// norm(x) * (1 + scale) + shift; out: tokens `stride` numbers apart.
template <typename T>
void modulate(const T* x, const Tokens& tokens, const Norm<T>& norm, const PerSample<T>& scales,
              const PerSample<T>& shifts, T* out, int64_t stride) {
  const int64_t size = tokens.size;
#pragma omp for schedule(static) nowait
  for (int64_t token = 0; token < tokens.count(); token++) {
    const T *from = x + token * size, *scale = scales.of(tokens, token), *shift = shifts.of(tokens, token);
    const auto found = norm.moments(from, size);
    for (int64_t i = 0; i < size; i += kWidth) {
      Vec y = normed(norm, found, from, i, size);
      if (scale) y *= 1.0f + load_within(scale, i, size);
      if (shift) y += load_within(shift, i, size);
      store_within(out + token * stride, y, i, size);
    }
  }
}

// x + gate * update, with `norm` x + gate * norm(update); `out` may be x.
template <typename T>
void add_gated(const T* x, const T* update, const Tokens& tokens, const Norm<T>* norm, const PerSample<T>& gates,
               T* out) {
  const int64_t size = tokens.size;
#pragma omp for schedule(static) nowait
  for (int64_t token = 0; token < tokens.count(); token++) {
    const T *from = x + token * size, *added = update + token * size, *gate = gates.of(tokens, token);
    const auto found = norm ? norm->moments(added, size) : typename Norm<T>::Moments{};
    for (int64_t i = 0; i < size; i += kWidth) {
      Vec y = norm ? normed(*norm, found, added, i, size) : load_within(added, i, size);
      if (gate) y *= load_within(gate, i, size);
      store_within(out + token * size, load_within(from, i, size) + y, i, size);
    }
  }
}

// A token's heads side by side: queries, keys, and `others` that stay as they are.
template <typename T>
struct HeadRow {
  int64_t queries, keys, others, size;
  int64_t turned;  // of queries and of keys, from the first on
  const T *query_norm, *key_norm;  // [size] or null
  float epsilon;
  int32_t neighbours;  // whether real and imaginary parts stand side by side, or in the two halves
};

// Complex numbers by turns [size / 2, 2], in float32; in place.
template <typename T>
inline void turn_one(T* real, T* imaginary, const float* by) {
  const float a = load_one(real), b = load_one(imaginary);
  store_one(real, a * by[0] - b * by[1]), store_one(imaginary, a * by[1] + b * by[0]);
}

template <typename T>
inline void turn_neighbours(T* x, const float* turns, int64_t size) {
  const IntVec swap = places([](int i) { return i ^ 1; }), sign = places([](int i) { return i & 1 ? 0 : INT32_MIN; });
  const IntVec even = places([](int i) { return i & ~1; }), odd = places([](int i) { return i | 1; });
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const Vec both = load(x + i), by = load(turns + i);
    const Vec cos = __builtin_shuffle(by, even), sin = __builtin_shuffle(by, odd);
    store(x + i, both * cos + __builtin_shuffle(both, swap) * bit_cast<Vec>(bit_cast<IntVec>(sin) ^ sign));
  }
  for (; i < size; i += 2) turn_one(x + i, x + i + 1, turns + i);
}

template <typename T>
inline void turn_halves(T* x, const float* turns, int64_t size) {
  const int64_t half = size / 2;
  const IntVec even = places([](int i) { return 2 * i; }), odd = places([](int i) { return 2 * i + 1; });
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const Vec first = load(turns + 2 * i), second = load(turns + 2 * i + kWidth);
    const Vec cos = __builtin_shuffle(first, second, even), sin = __builtin_shuffle(first, second, odd);
    const Vec real = load(x + i), imaginary = load(x + half + i);
    store(x + i, real * cos - imaginary * sin), store(x + half + i, real * sin + imaginary * cos);
  }
  for (; i < half; i++) turn_one(x + i, x + half + i, turns + 2 * i);
}

// Norms and turns the queries and keys of heads [samples * length, heads * size], in place. turns: [length, size / 2,
// 2], or null.
template <typename T>
void place(T* heads, const Tokens& tokens, const HeadRow<T>& row, const float* turns) {
  const int64_t all = row.queries + row.keys + row.others;
#pragma omp for schedule(static) nowait
  for (int64_t token = 0; token < tokens.count(); token++)
    for (int64_t head = 0; head < row.queries + row.keys; head++) {
      T* x = heads + (token * all + head) * row.size;
      const T* weight = head < row.queries ? row.query_norm : row.key_norm;
      if (weight) norm_row(x, weight, row.size, row.epsilon, x);
      if (!turns || (head < row.queries ? head : head - row.queries) >= row.turned) continue;
      const float* by = turns + token % tokens.length * row.size;
      row.neighbours ? turn_neighbours(x, by, row.size) : turn_halves(x, by, row.size);
    }
}

}  // namespace omni
