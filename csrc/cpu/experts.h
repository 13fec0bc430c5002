// A sparse mixture of gated experts in one parallel region: rows are gathered by expert, multiplied with the panels of
// those experts that have any, and added. What is computed, and where it is rounded, is what vllm_omni/layers/moe.py says
// in torch.
#pragma once

#include <vector>

#include "elementwise.h"
#include "gemm.h"
#include "team.h"

namespace omni {

template <typename T>
struct Expert {
  Linear<T> gate_up, down;
};

struct MixtureShape {
  int64_t rows, experts, chosen;  // chosen: of each row
  int64_t hidden, intermediate;
};

// Which rows each expert computes: those of expert e are at [starts[e], starts[e + 1]) of the gathered rows.
struct Gathering {
  std::vector<int64_t> active, starts;  // experts that have rows, and where theirs begin
  std::vector<int64_t> place;           // of row r and its chosen expert j, at r * chosen + j: where it is gathered
};

inline Gathering gather(const MixtureShape& shape, const int64_t* chosen) {
  const int64_t count = shape.rows * shape.chosen;
  Gathering found;
  std::vector<int64_t> next(size_t(shape.experts) + 1);
  for (int64_t i = 0; i < count; i++) next[size_t(chosen[i]) + 1]++;
  for (int64_t expert = 0; expert < shape.experts; expert++) {
    if (next[size_t(expert) + 1]) found.active.push_back(expert), found.starts.push_back(next[size_t(expert)]);
    next[size_t(expert) + 1] += next[size_t(expert)];
  }
  found.starts.push_back(count);
  found.place.resize(size_t(count));
  for (int64_t i = 0; i < count; i++) found.place[size_t(i)] = next[size_t(chosen[i])]++;
  return found;
}

// The products of gathered rows with one of each active expert's weights. To be called by every thread of a team.
template <typename T, typename Choose>
void multiply_gathered(const Gathering& gathering, const SpreadRows<T>& x, int64_t outputs, const Choose& choose, T* out) {
  constexpr int64_t kShare = 4;  // panels that a thread takes at once: experts have unlike numbers of rows
  const int64_t panels = outputs / kPanel, tasks = int64_t(gathering.active.size()) * panels;
#pragma omp for schedule(dynamic, kShare) nowait
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t index = task / panels, start = gathering.starts[size_t(index)];
    const int64_t rows = gathering.starts[size_t(index) + 1] - start;
    const Linear<T>& linear = choose(gathering.active[size_t(index)]);
    const int64_t panel = task % panels;
    compute_panel(x.row(start), x.stride, rows, linear, panel,
                  Finish<T>{linear, panel, out + start * outputs + panel * kPanel, outputs, nullptr});
  }
}

// The parts of each row [hidden], weighed and added in the order of `chosen`.
template <typename T>
void add_parts(const MixtureShape& shape, const Gathering& gathering, const T* parts, const T* weights, T* out) {
#pragma omp for schedule(static) nowait
  for (int64_t row = 0; row < shape.rows; row++) {
    const int64_t* place = gathering.place.data() + row * shape.chosen;
    const T* weight = weights + row * shape.chosen;
    T* to = out + row * shape.hidden;
    for (int64_t i = 0; i < shape.hidden; i += kWidth) {
      Vec total = rounded<T>(load(parts + place[0] * shape.hidden + i) * load_one(weight));
      for (int64_t j = 1; j < shape.chosen; j++)
        total = rounded<T>(total + rounded<T>(load(parts + place[j] * shape.hidden + i) * load_one(weight + j)));
      store(to + i, total);
    }
  }
}

// x [rows, hidden], chosen and weights [rows, chosen], ascending in a row -> out [rows, hidden].
template <typename T>
void mix_experts(const Expert<T>* experts, const MixtureShape& shape, const T* x, const int64_t* chosen,
                 const T* weights, T* out, int threads) {
  const Gathering gathering = gather(shape, chosen);
  const int64_t count = shape.rows * shape.chosen;
  SpreadRows<T> rows, gated;
  rows.reserve(count, shape.hidden), gated.reserve(count, shape.intermediate);
  std::vector<T> gate_up(size_t(count * 2 * shape.intermediate)), parts(size_t(count * shape.hidden));
  Team team;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; i++)
      std::memcpy(rows.row(gathering.place[size_t(i)]), x + i / shape.chosen * shape.hidden, size_t(shape.hidden) * sizeof(T));
    team.meet();
    multiply_gathered(gathering, rows, 2 * shape.intermediate,
                      [&](int64_t expert) -> const Linear<T>& { return experts[expert].gate_up; }, gate_up.data());
    team.meet();
    gate(gate_up.data(), count, shape.intermediate, gated.row(0), gated.stride);
    team.meet();
    multiply_gathered(gathering, gated, shape.hidden,
                      [&](int64_t expert) -> const Linear<T>& { return experts[expert].down; }, parts.data());
    team.meet();
    add_parts(shape, gathering, parts.data(), weights, out);
  }
}

}  // namespace omni
