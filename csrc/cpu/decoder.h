// The layers of a pre-norm transformer decoder, one after the other in one parallel region. What is computed, and where
// it is rounded, is what vllm_omni/layers/decoder.py says in torch.
#pragma once

#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "quantized.h"
#include "team.h"

namespace omni {

// Pointers may be null where a model has no such part: biases, norms of heads.
template <typename T>
struct Layer {
  const T *attention_norm, *query_norm, *key_norm, *mlp_norm;
  Linear<T> qkv, output, gate_up, down;
  int64_t window;  // 0: none
};

struct Shape {
  int64_t hidden, intermediate;
  Heads heads;
  float norm_epsilon;
};

// The rows of a step whose last states are wanted, ascending; null where all are.
struct Wanted {
  const int64_t* rows;
  int64_t count;
};

template <typename T>
struct Room {
  SpreadRows<T> normed, attended, gated;  // what is multiplied
  std::vector<T> qkv, query;
  QuantizedRows quantized;

  Room(const Shape& shape, int64_t rows) {
    const int64_t queries = shape.heads.queries * shape.heads.size, keys = shape.heads.keys * shape.heads.size;
    normed.reserve(rows, shape.hidden), attended.reserve(rows, queries), gated.reserve(rows, shape.intermediate);
    qkv.resize(size_t(rows * (queries + 2 * keys))), query.resize(size_t(rows * queries));
    quantized.reserve(rows, std::max({shape.hidden, queries, shape.intermediate}));
  }
};

// Heads of qkv [rows, queries | keys | values] are normed and turned: queries to `query`, keys and values into the cache.
template <typename T>
void place_heads(const Layer<T>& layer, const Shape& shape, const Step& step, const T* qkv, const T* cos, const T* sin,
                 const Cache<T>& cache, T* query) {
  const Heads& heads = shape.heads;
  const int64_t size = heads.size, all = heads.queries + 2 * heads.keys;
#pragma omp for schedule(static) nowait
  for (int64_t task = 0; task < step.rows * all; task++) {
    const int64_t row = task / all, head = task % all;
    const T* from = qkv + (row * all + head) * size;
    const int64_t slot = step.slots[row] * heads.keys * size;
    if (head >= heads.queries + heads.keys) {
      std::memcpy(cache.values + slot + (head - heads.queries - heads.keys) * size, from, size_t(size) * sizeof(T));
      continue;
    }
    const bool is_query = head < heads.queries;
    T* to = is_query ? query + (row * heads.queries + head) * size : cache.keys + slot + (head - heads.queries) * size;
    const T* weight = is_query ? layer.query_norm : layer.key_norm;
    T normed[kMostSize];
    if (weight) norm_row(from, weight, size, shape.norm_epsilon, normed), from = normed;
    rotate_row(from, cos + row * size, sin + row * size, size, to);
  }
}

// The wanted rows move to the front, elements of `size`, `stride` apart. By one thread: each moves to where another stood.
template <typename T>
void keep(const Wanted& wanted, T* x, int64_t size, int64_t stride) {
  for (int64_t row = 0; row < wanted.count; row++)
    if (wanted.rows[row] != row) std::copy_n(x + wanted.rows[row] * stride, size, x + row * stride);
}

// states [rows, hidden], in place; cos, sin: [rows, D]; cache: of each layer. Behind the keys and values of the last one go
// on the wanted rows alone, which stand in front in the end.
template <typename T>
void run_layers(const Layer<T>* layers, int64_t count, const Shape& shape, const Step& step, const T* cos, const T* sin,
                const Cache<T>* caches, const Wanted& wanted, T* states, int threads) {
  Room<T> room(shape, step.rows);
  Plan plan;
  Team team;
  Heads heads = shape.heads;
  const auto factor = [&](const SpreadRows<T>& x, int64_t rows) {
    return Factor<T>{x.row(0), x.stride, rows, room.quantized};
  };
#pragma omp parallel num_threads(threads)
  for (int64_t index = 0; index < count; index++) {
    const Layer<T>& layer = layers[index];
#pragma omp single nowait
    if (index == 0 || heads.window != layer.window) {
      heads.window = layer.window;
      plan.make(step, heads, threads);
    }
    norm(states, layer.attention_norm, step.rows, shape.hidden, shape.norm_epsilon, room.normed.row(0), room.normed.stride);
    team.meet();
    project(team, factor(room.normed, step.rows), layer.qkv, room.qkv.data(), layer.qkv.outputs);
    team.meet();
    place_heads(layer, shape, step, room.qkv.data(), cos, sin, caches[index], room.query.data());
    team.meet();
    attend(team, plan, step, heads, room.query.data(), caches[index], room.attended.row(0), room.attended.stride);
    team.meet();
    int64_t rows = step.rows;
    if (index + 1 == count && wanted.count < rows) {
      rows = wanted.count;
#pragma omp single nowait
      {
        keep(wanted, states, shape.hidden, shape.hidden);
        keep(wanted, room.attended.row(0), heads.queries * heads.size, room.attended.stride);
      }
      team.meet();
    }
    project(team, factor(room.attended, rows), layer.output, states, shape.hidden, states);
    team.meet();
    norm(states, layer.mlp_norm, rows, shape.hidden, shape.norm_epsilon, room.normed.row(0), room.normed.stride);
    team.meet();
    project_gated(team, factor(room.normed, rows), layer.gate_up, room.gated.row(0), room.gated.stride);
    team.meet();
    project(team, factor(room.gated, rows), layer.down, states, shape.hidden, states);
    team.meet();
  }
}

}  // namespace omni
