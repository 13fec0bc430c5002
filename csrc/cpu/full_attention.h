// Attention of everything to everything within each sample, or to what is near: keys and values are packed once as a
// weight is (gemm.h), and multiplied so, by an online softmax in float32 over blocks of keys. What a query's result is
// does not depend on other samples.
#pragma once

#include <memory>

#include "attention.h"

namespace omni {

#if defined(OMNI_TILES)
constexpr int64_t kQueries = kTilePassRows;  // of a task
#else
constexpr int64_t kQueries = 24;
#endif
constexpr int64_t kBlockKeys = 512;  // at once
constexpr int64_t kMostFullSize = 512;  // of a head: pictures' autoencoders have one head of all channels
static_assert(kQueries >= kMostGroup, "a token at least");

// Heads of tokens of samples; how many numbers apart the next of each stands.
template <typename T>
struct Operand {
  const T* data;
  int64_t sample, token, head;

  const T* at(int64_t s, int64_t t, int64_t h) const { return data + s * sample + t * token + h * head; }
};

// What a query sees: of tokens in blocks, the first of which may lack its first `offset`, its own block and some to each
// side. Blocks of no token: everything.
struct Band {
  int64_t block, offset, back, ahead;

  int64_t first(int64_t position) const { return ((position + offset) / block - back) * block - offset; }
  int64_t stop(int64_t position) const { return ((position + offset) / block + ahead + 1) * block - offset; }
};

struct FullShape {
  int64_t samples, queries, keys;     // tokens
  int64_t query_heads, key_heads, size;
  Band band;
  float scale;

  int64_t panels() const { return (keys + kPanel - 1) / kPanel; }
  int64_t group() const { return query_heads / key_heads; }
};

// [panels * kPanel, size] of one head, as two weights: keys [tokens, size] and, on their side, values [size, tokens].
template <typename T>
struct PackedHeads {
  const FullShape& shape;
  std::unique_ptr<T[]> room;

  explicit PackedHeads(const FullShape& shape) : shape(shape), room(new T[size_t(2 * shape.samples * shape.key_heads * head())]) {}

  int64_t head() const { return shape.panels() * kPanel * shape.size; }
  T* keys(int64_t index) const { return room.get() + 2 * index * head(); }
  T* values(int64_t index) const { return keys(index) + head(); }

  void fill_panel(const Operand<T>& keys_from, const Operand<T>& values_from, int64_t index, int64_t panel) {
    alignas(64) static const T zeros[kMostFullSize] = {};
    const int64_t sample = index / shape.key_heads, kv_head = index % shape.key_heads, first = panel * kPanel;
    const T *key_rows[kPanel], *value_rows[kPanel];
    for (int64_t i = 0; i < kPanel; i++) {
      const bool is_there = first + i < shape.keys;
      key_rows[i] = is_there ? keys_from.at(sample, first + i, kv_head) : zeros;
      value_rows[i] = is_there ? values_from.at(sample, first + i, kv_head) : zeros;
    }
    pack_rows(key_rows, shape.size, keys(index) + first * shape.size);
    pack_columns(value_rows, shape.size, shape.panels() * kPanel, values(index) + first * kPanel);
  }
};

// A task: some queries of one sample and key-value head, those of a group's heads side by side.
template <typename T>
struct FullTask {
  const FullShape& shape;
  const T *keys, *values;  // packed
  int64_t first, count;    // tokens
  alignas(64) T queries[kQueries * kMostFullSize];
  alignas(64) T weights[kQueries * kBlockKeys];
  alignas(64) float scores[kQueries * kBlockKeys];
  RunningOf<kMostFullSize> running[kQueries];

  FullTask(const FullShape& shape) : shape(shape) {}

  int64_t rows() const { return count * shape.group(); }
  int64_t position(int64_t row) const { return first + row / shape.group(); }

  void run() {
    const int64_t all = shape.panels();
    int64_t panel = 0, stop = all;
    if (shape.band.block) {
      panel = std::max<int64_t>(shape.band.first(first), 0) / kPanel;
      stop = std::min(all, (shape.band.stop(first + count - 1) - 1) / kPanel + 1);
    }
    for (int64_t row = 0; row < rows(); row++) running[row].clear(shape.size);
    for (; panel < stop; panel += kBlockKeys / kPanel) block(panel, std::min(kBlockKeys / kPanel, stop - panel));
  }

  void block(int64_t panel, int64_t panels) {
    const int64_t width = panels * kPanel, begin = panel * kPanel;
    for (int64_t p = 0; p < panels; p++)
      multiply_rows(queries, shape.size, rows(), shape.size, keys + (begin + p * kPanel) * shape.size,
                    [&](int64_t row, int64_t i, Vec sum) { store(scores + row * width + p * kPanel + i, sum * shape.scale); });
    float shrinks[kQueries];
    for (int64_t row = 0; row < rows(); row++) {
      float* own = scores + row * width;
      hide_far(own, position(row), begin, width);
      running[row].weigh(own, width, weights + row * width, shrinks[row]);
    }
    for (int64_t d = 0; d < shape.size; d += kPanel)
      multiply_rows(weights, width, rows(), width, values + d * shape.panels() * kPanel + begin * kPanel,
                  [&](int64_t row, int64_t i, Vec sum) {
                    float* sums = running[row].sums + d + i;
                    store(sums, load(sums) * shrinks[row] + sum);
                  });
  }

  // -infinity behind the last key and outside of the band.
  void hide_far(float* scores, int64_t position, int64_t begin, int64_t width) const {
    int64_t low = 0, high = std::min(width, shape.keys - begin);
    if (shape.band.block) {
      low = std::clamp<int64_t>(shape.band.first(position) - begin, 0, width);
      high = std::clamp<int64_t>(shape.band.stop(position) - begin, 0, high);
    }
    for (int64_t i = 0; i < low; i++) scores[i] = -INFINITY;
    for (int64_t i = std::max(high, low); i < width; i++) scores[i] = -INFINITY;
  }
};

// out: [samples, queries, query_heads * size], tokens `stride` numbers apart. To be called by every thread of a team, which
// shares the work.
template <typename T>
void attend_fully(Team& team, const FullShape& shape, const Operand<T>& query, const Operand<T>& key,
                  const Operand<T>& value, PackedHeads<T>& packed, T* out, int64_t stride) {
  const int64_t heads = shape.samples * shape.key_heads, panels = shape.panels(), group = shape.group();
#pragma omp for schedule(static) nowait
  for (int64_t index = 0; index < heads * panels; index++) packed.fill_panel(key, value, index / panels, index % panels);
  team.meet();
  const int64_t tokens = kQueries / group, blocks = (shape.queries + tokens - 1) / tokens;
  auto task = std::make_unique<FullTask<T>>(shape);
#pragma omp for schedule(dynamic, 1) nowait
  for (int64_t index = 0; index < heads * blocks; index++) {
    const int64_t head = index / blocks, sample = head / shape.key_heads, first_head = head % shape.key_heads * group;
    task->keys = packed.keys(head), task->values = packed.values(head);
    task->first = index % blocks * tokens, task->count = std::min(tokens, shape.queries - task->first);
    for (int64_t row = 0; row < task->rows(); row++)
      std::memcpy(task->queries + row * shape.size, query.at(sample, task->position(row), first_head + row % group),
                  size_t(shape.size) * sizeof(T));
    task->run();
    for (int64_t row = 0; row < task->rows(); row++) {
      T* token = out + (sample * shape.queries + task->position(row)) * stride;
      task->running[row].write(token + (first_head + row % group) * shape.size, shape.size);
    }
  }
}

}  // namespace omni
