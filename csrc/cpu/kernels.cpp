// What Python calls, by the name of the element type. Pointers and sizes are checked there; nothing is kept here but room
// to work in.
#include "convolution.h"
#include "decoder.h"
#include "diffusion.h"
#include "diffusion_blocks.h"
#include "experts.h"
#include "full_attention.h"
#include "picture_norms.h"
#include "snake.h"
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
  void multiply_##NAME(const T* x, int64_t rows, const Linear<T>* linear, bool is_gated, T* out, int threads) {        \
    multiply_all(x, rows, *linear, is_gated, out, threads);                                                            \
  }                                                                                                                    \
  void attend_##NAME(const Step* step, const Heads* heads, const T* query, const Cache<T>* cache, T* out,              \
                     int threads) {                                                                                    \
    Plan plan;                                                                                                         \
    Team team;                                                                                                         \
    plan.make(*step, *heads, threads);                                                                                 \
    TEAM attend(team, plan, *step, *heads, query, *cache, out, heads->queries * heads->size);                          \
  }                                                                                                                    \
  void find_largest_##NAME(const T* logits, int64_t rows, int64_t size, int64_t* found, int threads) {                 \
    TEAM find_largest(logits, rows, size, found);                                                                      \
  }                                                                                                                    \
  void find_top_##NAME(const T* logits, int64_t rows, int64_t size, int64_t count, float* values, int64_t* places,     \
                       int threads) {                                                                                  \
    TEAM find_top(logits, rows, size, count, values, places);                                                          \
  }                                                                                                                    \
  void run_layers_##NAME(const Layer<T>* layers, int64_t count, const Shape* shape, const Step* step, const T* cos,    \
                         const T* sin, const Cache<T>* caches, const Wanted* wanted, T* states, int threads) {         \
    run_layers(layers, count, *shape, *step, cos, sin, caches, *wanted, states, threads);                              \
  }                                                                                                                    \
  void mix_experts_##NAME(const Expert<T>* experts, const MixtureShape* shape, const T* x, const int64_t* chosen,      \
                          const T* weights, T* out, int threads) {                                                     \
    mix_experts(experts, *shape, x, chosen, weights, out, threads);                                                    \
  }

#define DIFFUSION_EXPORTS(NAME, T)                                                                                     \
  void modulate_##NAME(const T* x, const Tokens* tokens, const Norm<T>* norm, const PerSample<T>* scales,              \
                       const PerSample<T>* shifts, T* out, int threads) {                                              \
    TEAM modulate(x, *tokens, *norm, *scales, *shifts, out, tokens->size);                                             \
  }                                                                                                                    \
  void add_gated_##NAME(const T* x, const T* update, const Tokens* tokens, const Norm<T>* norm,                        \
                        const PerSample<T>* gates, T* out, int threads) {                                              \
    TEAM add_gated(x, update, *tokens, norm, *gates, out);                                                             \
  }                                                                                                                    \
  void place_##NAME(T* heads, const Tokens* tokens, const HeadRow<T>* row, const float* turns, int threads) {          \
    TEAM place(heads, *tokens, *row, turns);                                                                           \
  }                                                                                                                    \
  void gate_##NAME(const T* gate_up, int64_t rows, int64_t width, T* out, int threads) {                               \
    TEAM gate(gate_up, rows, width, out, width);                                                                       \
  }                                                                                                                    \
  void gelu_##NAME(const T* x, int64_t count, T* out, int threads) {                                                   \
    TEAM gelu(x, count, out);                                                                                          \
  }                                                                                                                    \
  void run_blocks_##NAME(const DiffusionBlock<T>* blocks, int64_t count, const TokenSpan* spans, int64_t span_count,   \
                         const Modulations<T>* modulations, T* states, int threads) {                                  \
    BlockRun<T> run(*blocks, spans, span_count, *modulations, states);                                                 \
    TEAM run.run(blocks, count);                                                                                       \
  }                                                                                                                    \
  void snake_##NAME(const T* x, const T* frequency, const T* amplitude, int64_t outer, int64_t channels,               \
                    int64_t inner, T* out, int threads) {                                                              \
    TEAM snake(x, frequency, amplitude, outer, channels, inner, out);                                                  \
  }                                                                                                                    \
  void filtered_snake_##NAME(const T* x, const T* frequency, const T* amplitude, const float* taps, int64_t outer,      \
                             int64_t channels, int64_t length, T* out, int threads) {                                  \
    TEAM filtered_snake(x, frequency, amplitude, taps, outer, channels, length, out);                                  \
  }                                                                                                                    \
  void convolve_##NAME(const T* x, const Pictures* pictures, const Filter<T>* filter, int32_t kind, T* out,              \
                       int threads) {                                                                                  \
    TEAM convolve(x, *pictures, *filter, TileKind(kind), out);                                                         \
  }                                                                                                                    \
  void group_norm_##NAME(const T* x, const GroupNormShape* shape, const T* weight, const T* bias, T* out,              \
                         int threads) {                                                                                \
    GroupNorm<T> norm(*shape, weight, bias);                                                                           \
    Team team;                                                                                                         \
    TEAM norm.run(team, x, out);                                                                                       \
  }                                                                                                                    \
  void norm_pixels_##NAME(const T* x, const T* weight, int64_t pixels, int64_t channels, float epsilon, bool activated,  \
                          T* out, int threads) {                                                                       \
    TEAM norm_pixels(x, weight, pixels, channels, epsilon, activated, out);                                            \
  }                                                                                                                    \
  void attend_fully_##NAME(const FullShape* shape, const Operand<T>* query, const Operand<T>* key,                     \
                           const Operand<T>* value, T* out, int threads) {                                             \
    PackedHeads<T> packed(*shape);                                                                                     \
    Team team;                                                                                                         \
    TEAM attend_fully(team, *shape, *query, *key, *value, packed, out, shape->query_heads * shape->size);              \
  }

extern "C" {
// What structures.py says of the structs and arguments that this is compiled for.
uint64_t compiled_interface() { return OMNI_INTERFACE; }

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
DIFFUSION_EXPORTS(float32, float)
DIFFUSION_EXPORTS(bfloat16, bfloat16)
LAYOUT_EXPORTS(int8, int8_t)
}
