// What Python calls, by the name of the element type. Pointers and sizes are checked there; nothing is kept here.
#include "decoder.h"
#include "vocabulary.h"

using namespace omni;

#define TEAM _Pragma("omp parallel num_threads(threads)")

#define LAYOUT_EXPORTS(NAME, T)                                                                                        \
  void pack_##NAME(T* weight, int64_t outputs, int64_t inputs, int threads) {                                          \
    TEAM pack(weight, outputs, inputs);                                                                                \
  }                                                                                                                    \
  void unpack_rows_##NAME(const T* packed, int64_t inputs, const int64_t* ids, int64_t rows, T* out, int threads) {    \
    TEAM unpack_rows(packed, inputs, ids, rows, out);                                                                  \
  }

#define EXPORTS(NAME, T)                                                                                               \
  LAYOUT_EXPORTS(NAME, T)                                                                                              \
  void multiply_##NAME(const T* x, int64_t rows, const Linear<T>* linear, T* out, int threads) {                       \
    Team team;                                                                                                         \
    QuantizedRows quantized;                                                                                           \
    if (linear->scales) quantized.reserve(rows, linear->inputs);                                                       \
    TEAM project(team, x, rows, *linear, quantized, out);                                                              \
  }                                                                                                                    \
  void attend_##NAME(const Step* step, const Heads* heads, const T* query, const Cache<T>* cache, T* out,              \
                     int threads) {                                                                                    \
    Plan plan;                                                                                                         \
    Team team;                                                                                                         \
    plan.make(*step, *heads);                                                                                          \
    TEAM attend(team, plan, *step, *heads, query, *cache, out);                                                              \
  }                                                                                                                    \
  void find_largest_##NAME(const T* logits, int64_t rows, int64_t size, int64_t* found, int threads) {                 \
    TEAM find_largest(logits, rows, size, found);                                                                      \
  }                                                                                                                    \
  void run_layers_##NAME(const Layer<T>* layers, int64_t count, const Shape* shape, const Step* step, const T* cos,    \
                         const T* sin, const Cache<T>* caches, T* states, int threads) {                               \
    run_layers(layers, count, *shape, *step, cos, sin, caches, states, threads);                                       \
  }

extern "C" {
// Whether the process may use what this is compiled for.
bool prepare() {
#if defined(OMNI_TILES)
  return may_use_tiles();
#else
  return true;
#endif
}

EXPORTS(float32, float)
EXPORTS(bfloat16, bfloat16)
LAYOUT_EXPORTS(int8, int8_t)
}
