// Causal attention over a paged cache, its pages read in place, by an online softmax in float32.
//
// A task is some rows of one sequence and one key-value head. A single row whose context is long is cut into parts of
// kPartTokens tokens, which are tasks of their own and joined afterwards: where, depends on the sequence alone.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "team.h"

namespace omni {

constexpr int64_t kTile = kPanel;        // tokens at once
constexpr int64_t kMostSize = 256;       // of a head
constexpr int64_t kMostGroup = 16;       // query heads of a key-value head
constexpr int64_t kMostQueries = 128;    // of a task: rows times heads
constexpr int64_t kManyQueries = 8;      // of a sequence, from which on tiles are packed, and multiplied as weights are
constexpr int64_t kPartTokens = 1024;

// Where the tokens of a step stand; see AttentionMetadata.
struct Step {
  const int64_t* slots;          // [rows]
  const int64_t* query_starts;   // [sequences + 1]
  const int64_t* context_lens;   // [sequences]
  const int64_t* block_table;    // [sequences, table_stride]
  int64_t rows, sequences, table_stride, block_size;
};

struct Heads {
  int64_t queries, keys, size;   // H, K, D
  int64_t window;                // 0: all before
  float scale;
};

template <typename T>
struct Cache {
  T *keys, *values;              // [blocks, block_size, K, D]
};

// One task: rows of a sequence, and key-value heads that stand side by side, so that what is read of a token is one piece.
// Where it is a part of its rows' keys, its sums go to `part` for its first head, and `next_part` further for each other.
struct Task {
  int64_t sequence, head, num_heads, first_row, num_rows;
  int64_t position;  // of the first row; the others follow
  int64_t begin, end, part, next_part;
  bool is_of_many;  // how it is computed is a matter of its whole sequence: where that was cut shows in no bit
};

// sums[i] = the sum of parts[i], kWidth of them at once: pairs of neighbours are added until one vector is left.
inline Vec sum_each(Vec* parts) {
#if defined(__AVX512F__)
  const IntVec even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#else
  const IntVec even = {0, 2, 4, 6, 8, 10, 12, 14};
#endif
  for (int count = kWidth / 2; count > 0; count /= 2)
    for (int i = 0; i < count; i++) {
      const Vec a = parts[2 * i], b = parts[2 * i + 1];
      parts[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
    }
  return parts[0];
}

// Tokens of a task, at most kTile, and where each one's first head stands in the keys and in the values.
struct Tile {
  int64_t at[kTile];
  int64_t begin, count;

  Tile(const Step& step, const Heads& heads, const Task& task, int64_t begin)
      : begin(begin), count(std::clamp<int64_t>(task.end - begin, 0, kTile)) {
    const int64_t* table = step.block_table + task.sequence * step.table_stride;
    for (int64_t i = 0; i < count; i++) {
      const int64_t slot = table[(begin + i) / step.block_size] * step.block_size + (begin + i) % step.block_size;
      at[i] = slot * heads.keys * heads.size;
    }
  }
};

// Keys or values of a tile's tokens for one head.
template <typename T>
struct Rows {
  const T* first;  // of the head in slot 0
  const Tile* tile;

  const T* operator[](int64_t i) const { return first + tile->at[i]; }
};

// Keys or values of a tile that comes later, for all heads of its task. They are asked for in the order of memory, as much
// with each call as one token has of one head: into the second cache, since the nearest waits for few lines at once, and
// what is computed would wait with it.
template <typename T>
struct Coming {
  Rows<T> rows;  // of the task's first head
  int64_t heads, size;
  int64_t token = 0, head = 0;

  void ask() {
    if (token >= rows.tile->count) return;
    const char* from = reinterpret_cast<const char*>(rows[token] + head * size);
    for (int64_t byte = 0; byte < size * int64_t(sizeof(T)); byte += kLine) __builtin_prefetch(from + byte, 0, kSecondCache);
    if (++head == heads) head = 0, token++;
  }
};

// The running softmax of one query: what it needs so that tiles can come one after the other. kSize: of a head, at most.
template <int64_t kSize>
struct RunningOf {
  float largest, total;
  alignas(64) float sums[kSize];

  void clear(int64_t size) {
    largest = -INFINITY, total = 0;
    std::memset(sums, 0, size_t(size) * sizeof(float));
  }

  // scores [width], -infinity where nothing is seen -> the weights, zero if there is nothing to see; what came before is
  // to be multiplied by `shrink`. Whether anything is seen.
  template <typename T>
  bool weigh(const float* scores, int64_t width, T* weights, float& shrink) {
    Vec most = load(scores);
    for (int64_t i = kWidth; i < width; i += kWidth) most = max(most, load(scores + i));
    const float now = omni::largest(most);
    shrink = 1.0f;
    if (now == -INFINITY) {
      std::memset(weights, 0, size_t(width) * sizeof(T));
      return false;
    }
    if (now > largest) {
      shrink = largest == -INFINITY ? 0.0f : exp(splat(largest - now))[0];
      largest = now, total *= shrink;
    }
    Vec added{};
    for (int64_t i = 0; i < width; i += kWidth) {
      const Vec seen = load(scores + i), weight = exp_below_one(seen - largest);
      const Vec visible = select(seen == -INFINITY, splat(0.0f), weight);
      store(weights + i, visible), added += visible;
    }
    total += sum(added);
    return true;
  }

  // The same in the place of the scores of a tile, and what came before shrinks.
  bool weigh(float* scores, int64_t size) {
    float shrink;
    const bool sees = weigh(scores, kTile, scores, shrink);
    if (shrink != 1.0f) scale(sums, size, shrink);
    return sees;
  }

  void join(const RunningOf& other, int64_t size) {
    if (other.largest == -INFINITY) return;
    const float most = largest > other.largest ? largest : other.largest;
    const float mine = largest == -INFINITY ? 0.0f : exp(splat(largest - most))[0];
    const float its = exp(splat(other.largest - most))[0];
    total = total * mine + other.total * its, largest = most;
    for (int64_t d = 0; d < size; d += kWidth) store(sums + d, load(sums + d) * mine + load(other.sums + d) * its);
  }

  template <typename T>
  void write(T* out, int64_t size) const {
    int64_t d = 0;
    for (; d + kWidth <= size; d += kWidth) store(out + d, load(sums + d) / total);
    for (; d < size; d++) store_one(out + d, sums[d] / total);
  }
};

using Running = RunningOf<kMostSize>;

// -infinity where the query at `position` does not see, and behind the tile's tokens.
inline void hide(float* scores, int64_t position, int64_t window, int64_t begin, int64_t count) {
  const int64_t stop = position + 1 - begin < count ? position + 1 - begin : count;
  for (int64_t i = stop > 0 ? stop : 0; i < kTile; i++) scores[i] = -INFINITY;
  if (window)
    for (int64_t i = 0; i < kTile && begin + i <= position - window; i++) scores[i] = -INFINITY;
}

// Few queries: keys and values of one head are multiplied where they stand, by kQueries at once, [kQueries, kMostSize]
// each.
template <typename T>
struct DirectTile {
  Rows<T> keys, values;
  Coming<T>&coming_keys, &coming_values;
  int64_t count, size;

  template <int kQueries>
  void score(const T* queries, float factor, float* scores) const {
    const int64_t whole = size / kStep * kStep;
    for (int64_t first = 0; first < count; first += kWidth) {
      alignas(64) Vec parts[kQueries][kWidth];
      const int64_t stop = count - first < kWidth ? count - first : kWidth;
      for (int64_t i = 0; i < stop; i++) {
        coming_keys.ask();
        add_products<kQueries>(queries, keys[first + i], whole, parts, i);
      }
      for (int64_t i = stop; i < kWidth; i++)
        for (int r = 0; r < kQueries; r++) parts[r][i] = Vec{};
      for (int r = 0; r < kQueries; r++) {
        store(scores + r * kTile + first, sum_each(parts[r]) * factor);
        for (int64_t i = 0; i < stop; i++)
          for (int64_t d = whole; d < size; d++)
            scores[r * kTile + first + i] +=
                load_one(queries + r * kMostSize + d) * load_one(keys[first + i] + d) * factor;
      }
    }
  }

  // sums: of the first query; those of the others follow in the array.
  template <int kQueries>
  void add_values(const float* weights, Running* running) const {
    int64_t d = 0;
    for (; d + kHeld * kWidth <= size; d += kHeld * kWidth) add_columns<kQueries, kHeld>(weights, d, running);
    for (; d + kWidth <= size; d += kWidth) add_columns<kQueries, 1>(weights, d, running);
    for (; d < size; d++)
      for (int r = 0; r < kQueries; r++)
        for (int64_t i = 0; i < count; i++) running[r].sums[d] += weights[r * kTile + i] * load_one(values[i] + d);
  }

 private:
#if defined(__AVX512BF16__)
  static constexpr int64_t kStep = sizeof(T) == 2 ? 2 * kWidth : kWidth;  // elements of a key at once
#else
  static constexpr int64_t kStep = kWidth;
#endif
  static constexpr int kHeld = kWidth == 16 ? 8 : 4;  // vectors of a value's columns in registers, for each query

  template <int kQueries>
  static void add_products(const T* queries, const T* key, int64_t whole, Vec (&parts)[kQueries][kWidth], int64_t i) {
    Vec sums[kQueries] = {};
    for (int64_t d = 0; d < whole; d += kStep) {
      if constexpr (kStep == 2 * kWidth) {
#if defined(__AVX512BF16__)
        const __m512bh k = (__m512bh)_mm512_loadu_si512(key + d);
        for (int r = 0; r < kQueries; r++)
          sums[r] = (Vec)_mm512_dpbf16_ps((__m512)sums[r], (__m512bh)_mm512_loadu_si512(queries + r * kMostSize + d), k);
#endif
      } else {
        const Vec k = load(key + d);
        for (int r = 0; r < kQueries; r++) sums[r] += load(queries + r * kMostSize + d) * k;
      }
    }
    for (int r = 0; r < kQueries; r++) parts[r][i] = sums[r];
  }

  template <int kQueries, int kVecs>
  void add_columns(const float* weights, int64_t d, Running* running) const {
    Vec held[kQueries][kVecs];
    for (int r = 0; r < kQueries; r++)
      for (int v = 0; v < kVecs; v++) held[r][v] = load(running[r].sums + d + v * kWidth);
    for (int64_t i = 0; i < count; i++) {
      if (d == 0) coming_values.ask();
      const T* from = values[i] + d;
      for (int v = 0; v < kVecs; v++) {
        const Vec value = load(from + v * kWidth);
        for (int r = 0; r < kQueries; r++) held[r][v] += weights[r * kTile + i] * value;
      }
    }
    for (int r = 0; r < kQueries; r++)
      for (int v = 0; v < kVecs; v++) store(running[r].sums + d + v * kWidth, held[r][v]);
  }
};

// A tile of one key-value head and kQueries queries of one row, at `position`.
template <int kQueries, typename T>
void attend_tile(const DirectTile<T>& direct, const Heads& heads, const T* queries, int64_t position, int64_t begin,
                 Running* running) {
  alignas(64) float scores[kQueries * kTile];
  direct.template score<kQueries>(queries, heads.scale, scores);
  for (int r = 0; r < kQueries; r++) {
    hide(scores + r * kTile, position, heads.window, begin, direct.count);
    running[r].weigh(scores + r * kTile, heads.size);
  }
  direct.template add_values<kQueries>(scores, running);
}

// Tile by tile, and in each head by head. next: the task that is likely to come after it, or null.
template <typename T>
void attend_few(const Task& task, const Task* next, const Step& step, const Heads& heads, const T* query,
                const Cache<T>& cache, Running* running, T* queries) {
  const int64_t group = heads.queries / heads.keys, size = heads.size, count = task.num_rows * group;
  for (int64_t r = 0; r < task.num_heads * count; r++) {
    const int64_t head = task.head + r / count, row = task.first_row + r % count / group;
    std::memcpy(queries + r * kMostSize, query + (row * heads.queries + head * group + r % group) * size,
                size_t(size) * sizeof(T));
  }
  Tile tile(step, heads, task, task.begin);
  for (int64_t begin = task.begin; begin < task.end; begin += kTile) {
    const bool is_last = begin + kTile >= task.end;
    const Task& owner = is_last && next ? *next : task;
    const Tile after(step, heads, owner, is_last && next ? next->begin : begin + kTile);
    Coming<T> keys{{cache.keys + owner.head * size, &after}, owner.num_heads, size};
    Coming<T> values{{cache.values + owner.head * size, &after}, owner.num_heads, size};
    for (int64_t head = 0; head < task.num_heads; head++) {
      const int64_t first = (task.head + head) * size;
      const DirectTile<T> direct{{cache.keys + first, &tile}, {cache.values + first, &tile}, keys, values, tile.count, size};
      for (int64_t r = 0; r < count;) {
        const int64_t row = r / group, at = head * count + r;
        const bool is_pair = r + 1 < count && (r + 1) / group == row;
        const auto attend_queries = is_pair ? attend_tile<2, T> : attend_tile<1, T>;
        attend_queries(direct, heads, queries + at * kMostSize, task.position + row, begin, running + at);
        r += is_pair ? 2 : 1;
      }
    }
    tile = after;
  }
}

// kPanel rows, each [size], as the panel of a weight [kPanel, size].
template <typename T>
inline void pack_rows(const T* const* rows, int64_t size, T* to) {
  constexpr int64_t step = sizeof(T) == 2 ? 2 : 1;
  for (int64_t first = 0; first < kPanel; first += kWidth)
    for (int64_t d = 0; d < size; d += kWidth * step) {
      BitVec block[kWidth];
      for (int i = 0; i < kWidth; i++) std::memcpy(&block[i], rows[first + i] + d, sizeof(BitVec));
      transpose(block);
      for (int i = 0; i < kWidth; i++) std::memcpy(to + d * kPanel + (i * kPanel + first) * step, &block[i], sizeof(BitVec));
    }
}

// The same rows as kPanel inputs of a weight [size, inputs]; to: the first of them in its first panel.
template <typename T>
inline void pack_columns(const T* const* rows, int64_t size, int64_t inputs, T* to) {
  for (int64_t d = 0; d < size; d += kWidth)
    for (int64_t i = 0; i < kPanel; i += sizeof(T) == 2 ? 2 : 1)
      if constexpr (sizeof(T) == 2) {
        const BitVec low = bit_cast<BitVec>(load(rows[i] + d)) >> 16;
        const BitVec both = low | bit_cast<BitVec>(load(rows[i + 1] + d));
        std::memcpy(to + (d / kPanel * inputs + i) * kPanel + d % kPanel * 2, &both, sizeof(both));
      } else {
        store(to + (d / kPanel * inputs + i) * kPanel + d % kPanel, load(rows[i] + d));
      }
}

// Many queries: the tile is packed as a weight is, its keys [kTile, size] and, on their side, its values [size, kTile].
template <typename T>
struct PackedTile {
  alignas(64) T keys[kTile * kMostSize];
  alignas(64) T values[kTile * kMostSize];

  void fill(const Tile& tile, const Rows<T>& its_keys, const Rows<T>& its_values, int64_t size) {
    alignas(64) static const T zeros[kMostSize] = {};
    const T *key_rows[kTile], *value_rows[kTile];
    for (int64_t i = 0; i < kTile; i++) {
      key_rows[i] = i < tile.count ? its_keys[i] : zeros;
      value_rows[i] = i < tile.count ? its_values[i] : zeros;
    }
    pack_rows(key_rows, size, keys), pack_columns(value_rows, size, kTile, values);
  }
};

template <typename T>
void attend_many(const Task& task, const Step& step, const Heads& heads, const T* query, const Cache<T>& cache,
                 Running* running, T* queries) {
  const int64_t group = heads.queries / heads.keys, size = heads.size, count = task.num_rows * group;
  alignas(64) T weights[kMostQueries * kTile];
  alignas(64) float scores[kMostQueries * kTile];
  PackedTile<T> packed;
  for (int64_t r = 0; r < count; r++) {
    const T* from = query + ((task.first_row + r / group) * heads.queries + task.head * group + r % group) * size;
    std::memcpy(queries + r * size, from, size_t(size) * sizeof(T));
  }
  for (int64_t begin = task.begin; begin < task.end; begin += kTile) {
    const Tile tile(step, heads, task, begin);
    packed.fill(tile, {cache.keys + task.head * size, &tile}, {cache.values + task.head * size, &tile}, size);
    in_passes(count, [&](int64_t row, auto number) {
      Vec sums[number.value][kVectors] = {};
      multiply_panel<number.value>(queries + row * size, size, packed.keys, size, sums);
      for (int r = 0; r < number.value; r++)
        for (int v = 0; v < kVectors; v++) store(scores + (row + r) * kTile + v * kWidth, sums[r][v] * heads.scale);
    });
    for (int64_t r = 0; r < count; r++) {
      float* own = scores + r * kTile;
      hide(own, task.position + r / group, heads.window, begin, tile.count);
      running[r].weigh(own, size);
      for (int64_t i = 0; i < kTile; i += kWidth) store(weights + r * kTile + i, load(own + i));
    }
    for (int64_t d = 0; d < size; d += kPanel)
      in_passes(count, [&](int64_t row, auto number) {
        Vec sums[number.value][kVectors];
        for (int r = 0; r < number.value; r++)
          for (int v = 0; v < kVectors; v++) sums[r][v] = load(running[row + r].sums + d + v * kWidth);
        multiply_panel<number.value>(weights + row * kTile, kTile, packed.values + d * kTile, kTile, sums);
        for (int r = 0; r < number.value; r++)
          for (int v = 0; v < kVectors; v++) store(running[row + r].sums + d + v * kWidth, sums[r][v]);
      });
  }
}

// query [rows, H, D]; running: [num_heads, num_rows * group] of the task.
template <typename T>
void attend_task(const Task& task, const Task* next, const Step& step, const Heads& heads, const T* query,
                 const Cache<T>& cache, Running* running) {
  alignas(64) T queries[kMostQueries * kMostSize];
  const int64_t count = task.num_heads * task.num_rows * (heads.queries / heads.keys);
  for (int64_t r = 0; r < count; r++) running[r].clear((heads.size + kWidth - 1) / kWidth * kWidth);
  if (task.is_of_many)
    attend_many(task, step, heads, query, cache, running, queries);
  else
    attend_few(task, next, step, heads, query, cache, running, queries);
}

// All tasks of a step, for one window, and the parts that are joined afterwards.
struct Plan {
  struct Join {
    int64_t sequence, head, first_part, num_parts;
  };

  std::vector<Task> tasks;
  std::vector<Join> joins;
  std::vector<Running> parts;  // [parts, group]

  void make(const Step& step, const Heads& heads, int64_t threads) {
    tasks.clear(), joins.clear();
    num_parts_ = 0;
    const int64_t together = heads_together(step, heads, threads);
    for (int64_t sequence = 0; sequence < step.sequences; sequence++) {
      const int64_t rows = step.query_starts[sequence + 1] - step.query_starts[sequence];
      const bool is_of_many = heads.size % kPanel == 0 && rows * (heads.queries / heads.keys) >= kManyQueries;
      const int64_t num_heads = rows > 1 || is_of_many ? 1 : together;
      for (int64_t head = 0; head < heads.keys; head += num_heads) add(step, heads, sequence, head, num_heads, is_of_many);
    }
    parts.resize(size_t(num_parts_ * (heads.queries / heads.keys)));
  }

 private:
  static constexpr int64_t kTasksPerThread = 4;  // at least, so that threads end together

  int64_t num_parts_ = 0;

  // How many key-value heads of a single row make a task: what is computed does not depend on it.
  static int64_t heads_together(const Step& step, const Heads& heads, int64_t threads) {
    int64_t number = heads.keys;
    while (number > 1 && (heads.keys % number || number * (heads.queries / heads.keys) > kMostQueries ||
                          step.sequences * heads.keys < number * threads * kTasksPerThread))
      number--;
    return number;
  }

  void add(const Step& step, const Heads& heads, int64_t sequence, int64_t head, int64_t num_heads, bool is_of_many) {
    const int64_t start = step.query_starts[sequence], stop = step.query_starts[sequence + 1];
    const int64_t length = step.context_lens[sequence], group = heads.queries / heads.keys;
    const int64_t most = (heads.size % kPanel == 0 ? kMostQueries : kMostGroup) / group;
    for (int64_t row = start; row < stop; row += most) {
      const int64_t rows = stop - row < most ? stop - row : most;
      const int64_t first = length - (stop - row), end = first + rows;  // from the first row's position to the last one's
      const int64_t begin = heads.window && first - heads.window + 1 > 0 ? first - heads.window + 1 : 0;
      if (stop - start > 1 || end - begin <= kPartTokens) {
        tasks.push_back({sequence, head, num_heads, row, rows, first, begin, end, -1, 0, is_of_many});
        continue;
      }
      const int64_t count = (end - begin + kPartTokens - 1) / kPartTokens;
      for (int64_t i = 0; i < num_heads; i++) joins.push_back({sequence, head + i, num_parts_ + i * count, count});
      for (int64_t part = 0; part < count; part++) {
        const int64_t at = begin + part * kPartTokens;
        const int64_t stops = part + 1 < count ? at + kPartTokens : end;
        tasks.push_back({sequence, head, num_heads, row, 1, first, at, stops, num_parts_ + part, count, is_of_many});
      }
      num_parts_ += num_heads * count;
    }
  }
};

// query: [rows, H, D]; out: the same, rows `stride` elements apart. To be called by every thread of a team, which shares
// the tasks.
template <typename T>
void attend(Team& team, Plan& plan, const Step& step, const Heads& heads, const T* query, const Cache<T>& cache, T* out,
            int64_t stride) {
  const int64_t group = heads.queries / heads.keys, size = heads.size;
  Running own[kMostQueries];
#pragma omp for schedule(dynamic, 1) nowait
  for (size_t index = 0; index < plan.tasks.size(); index++) {
    const Task& task = plan.tasks[index];
    const size_t likely = index + size_t(omp_get_num_threads());  // the threads take turns, about
    attend_task(task, likely < plan.tasks.size() ? &plan.tasks[likely] : nullptr, step, heads, query, cache, own);
    const int64_t count = task.num_rows * group;
    for (int64_t r = 0; r < task.num_heads * count; r++) {
      const int64_t head = r / count, row = task.first_row + r % count / group;
      if (task.part < 0)
        own[r].write(out + row * stride + ((task.head + head) * group + r % group) * size, size);
      else
        plan.parts[size_t((task.part + head * task.next_part) * group + r % group)] = own[r];
    }
  }
  if (plan.joins.empty()) return;
  team.meet();
#pragma omp for schedule(static) nowait
  for (size_t index = 0; index < plan.joins.size(); index++) {
    const Plan::Join& join = plan.joins[index];
    for (int64_t g = 0; g < group; g++) {
      Running& whole = plan.parts[size_t(join.first_part * group + g)];
      for (int64_t part = 1; part < join.num_parts; part++)
        whole.join(plan.parts[size_t((join.first_part + part) * group + g)], size);
      whole.write(out + step.query_starts[join.sequence] * stride + (join.head * group + g) * size, size);
    }
  }
}

}  // namespace omni
