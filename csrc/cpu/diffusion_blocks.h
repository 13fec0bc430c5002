// The blocks of a diffusion transformer, attention and feed-forward each between two norms, one after the other in one
// parallel region. What is computed, and where it is rounded, is what the functions of diffusion.h, full_attention.h and
// gemm.h give that are called one by one: the same to the last bit.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "diffusion.h"
#include "full_attention.h"
#include "quantized.h"
#include "team.h"

namespace omni {

template <typename T>
struct DiffusionBlock {
  Norm<T> attention_norm, attended_norm, mlp_norm, computed_norm;  // before and after each part
  HeadRow<T> heads;
  Linear<T> qkv, output, gate_up, down;
};

// Neighbouring samples of equally many tokens; where they begin, and by what their heads are turned.
struct TokenSpan {
  int64_t sample, token;
  Tokens tokens;
  const float* turns;
};

// Of each block and sample four vectors: what attention's input is scaled by, what its result is gated by, and both for the
// feed-forward. Or null.
template <typename T>
struct Modulations {
  const T* data;  // [blocks, samples, 4, size]
  int64_t samples;

  PerSample<T> of(int64_t block, const TokenSpan& span, int64_t which) const {
    const int64_t size = span.tokens.size;
    return {data ? data + ((block * samples + span.sample) * 4 + which) * size : nullptr, 4 * size};
  }
};

// Works on states [tokens of all spans, size], in place.
template <typename T>
class BlockRun {
 public:
  BlockRun(const DiffusionBlock<T>& first, const TokenSpan* spans, int64_t span_count, const Modulations<T>& modulations,
           T* states)
      : spans_(spans, spans + span_count), modulations_(modulations), states_(states), hidden_(first.qkv.inputs) {
    const auto& heads = first.heads;
    for (const TokenSpan& span : spans_) {
      rows_ += span.tokens.count();
      shapes_.push_back({span.tokens.samples, span.tokens.length, span.tokens.length, heads.queries, heads.keys,
                         heads.size, -1, float(1 / std::sqrt(double(heads.size)))});
    }
    for (const FullShape& shape : shapes_) packed_.emplace_back(shape);
    const int64_t attended = first.output.inputs, gated = first.down.inputs;
    normed_.reserve(rows_, hidden_), attended_.reserve(rows_, attended), gated_.reserve(rows_, gated);
    qkv_.reset(new T[size_t(rows_ * first.qkv.outputs)]);
    update_.reset(new T[size_t(rows_ * hidden_)]);
    if (first.qkv.scales || first.output.scales || first.gate_up.scales || first.down.scales)
      quantized_.reserve(rows_, std::max({hidden_, attended, gated}));
  }

  // To be called by every thread of a team.
  void run(const DiffusionBlock<T>* blocks, int64_t count) {
    for (int64_t index = 0; index < count; index++) {
      attend(blocks[index], index);
      feed_forward(blocks[index], index);
    }
  }

 private:
  // A token's states are added to, and normed anew, by one thread: it is the same loop over the tokens.
  void attend(const DiffusionBlock<T>& block, int64_t index) {
    modulate_all(block.attention_norm, index, 0);
    team_.meet();
    project(team_, factor(normed_), block.qkv, qkv_.get());
    team_.meet();
    for (const TokenSpan& span : spans_) place(heads_of(span), span.tokens, block.heads, span.turns);
    team_.meet();
    for (size_t i = 0; i < spans_.size(); i++) attend_span(block.heads, i);
    team_.meet();
    project(team_, factor(attended_), block.output, update_.get());
    team_.meet();
    add_all(block.attended_norm, index, 1);
  }

  void feed_forward(const DiffusionBlock<T>& block, int64_t index) {
    modulate_all(block.mlp_norm, index, 2);
    team_.meet();
    project_gated(team_, factor(normed_), block.gate_up, gated_.row(0), gated_.stride);
    team_.meet();
    project(team_, factor(gated_), block.down, update_.get());
    team_.meet();
    add_all(block.computed_norm, index, 3);
  }

  void modulate_all(const Norm<T>& norm, int64_t index, int64_t which) {
    for (const TokenSpan& span : spans_)
      modulate(states_ + span.token * hidden_, span.tokens, norm, modulations_.of(index, span, which), PerSample<T>{},
               normed_.row(span.token), normed_.stride);
  }

  void add_all(const Norm<T>& norm, int64_t index, int64_t which) {
    for (const TokenSpan& span : spans_) {
      T *states = states_ + span.token * hidden_, *update = update_.get() + span.token * hidden_;
      add_gated(states, update, span.tokens, &norm, modulations_.of(index, span, which), states);
    }
  }

  void attend_span(const HeadRow<T>& heads, size_t index) {
    const int64_t all = (heads.queries + heads.keys + heads.others) * heads.size;
    const TokenSpan& span = spans_[index];
    const auto operand = [&](int64_t head) {
      return Operand<T>{heads_of(span) + head * heads.size, span.tokens.length * all, all, heads.size};
    };
    attend_fully(team_, shapes_[index], operand(0), operand(heads.queries), operand(heads.queries + heads.keys),
                 packed_[index], attended_.row(span.token), attended_.stride);
  }

  T* heads_of(const TokenSpan& span) {
    const FullShape& shape = shapes_[0];
    return qkv_.get() + span.token * (shape.query_heads + 2 * shape.key_heads) * shape.size;
  }

  Factor<T> factor(const SpreadRows<T>& x) { return {x.row(0), x.stride, rows_, quantized_}; }

  Team team_;
  std::vector<TokenSpan> spans_;
  const Modulations<T>& modulations_;
  T* states_;
  const int64_t hidden_;
  int64_t rows_ = 0;
  std::vector<FullShape> shapes_;            // of the spans
  std::vector<PackedHeads<T>> packed_;
  SpreadRows<T> normed_, attended_, gated_;  // what is multiplied
  std::unique_ptr<T[]> qkv_, update_;        // update_: what is added to the states
  QuantizedRows quantized_;
};

}  // namespace omni
