// What is asked of logits: the largest of each row, and whether all are finite. One pass.
#pragma once

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

}  // namespace omni
