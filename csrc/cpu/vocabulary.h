// What is asked of logits: the largest of each row, and whether all are finite; the first few in their order. One pass.
#pragma once

#include <algorithm>

#include "simd.h"

namespace omni {

// logits [rows, size] -> the first of the largest, or -1 for a row that holds NaN or infinity. To be called by every
// thread of a team, which shares the rows.
template <typename T>
void find_largest(const T* logits, int64_t rows, int64_t size, int64_t* found) {
#pragma omp for schedule(static) nowait
  for (int64_t row = 0; row < rows; row++) {
    const T* from = logits + row * size;
    Vec most = splat(-INFINITY);
    IntVec at = {}, place = {}, is_odd = {};
    for (int i = 0; i < kWidth; i++) place[i] = i;
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth, place += kWidth) {
      const Vec x = load(from + i);
      const IntVec is_more = x > most;
      is_odd |= (x - x != 0.0f);
      most = select(is_more, x, most);
      at = (place & is_more) | (at & ~is_more);
    }
    float value = -INFINITY;
    int64_t index = 0;
    bool is_finite = true;
    for (int lane = 0; lane < kWidth && i > 0; lane++) {
      is_finite = is_finite && !is_odd[lane];
      if (most[lane] > value || (most[lane] == value && at[lane] < index)) value = most[lane], index = at[lane];
    }
    for (; i < size; i++) {
      const float x = load_one(from + i);
      is_finite = is_finite && std::isfinite(x);
      if (x > value) value = x, index = i;
    }
    found[row] = is_finite ? index : -1;
  }
}

// logits [rows, size] -> values and places [rows, count], the largest of each row in falling order, of equal ones the
// first first; -infinity at place 0 where a row has fewer that are larger. A row with NaN gives some of its numbers. A few
// at a time are compared with the least that is kept, and most of them are done with. To be called as find_largest.
template <typename T>
void find_top(const T* logits, int64_t rows, int64_t size, int64_t count, float* values, int64_t* places) {
#pragma omp for schedule(static) nowait
  for (int64_t row = 0; row < rows; row++) {
    const T* from = logits + row * size;
    float* kept = values + row * count;
    int64_t* at = places + row * count;
    std::fill(kept, kept + count, -INFINITY);
    std::fill(at, at + count, 0);
    const auto offer = [&](float x, int64_t index) {
      if (!(x > kept[count - 1])) return;
      int64_t i = count - 1;
      for (; i > 0 && x > kept[i - 1]; i--) kept[i] = kept[i - 1], at[i] = at[i - 1];
      kept[i] = x, at[i] = index;
    };
    int64_t i = 0;
    for (; i + 4 * kWidth <= size; i += 4 * kWidth) {
      const Vec low = max(load(from + i), load(from + i + kWidth));
      const Vec high = max(load(from + i + 2 * kWidth), load(from + i + 3 * kWidth));
      if (!(largest(max(low, high)) <= kept[count - 1]))
        for (int64_t j = i; j < i + 4 * kWidth; j++) offer(load_one(from + j), j);
    }
    for (; i < size; i++) offer(load_one(from + i), i);
  }
}

}  // namespace omni
