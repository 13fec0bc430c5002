// The blocks of a diffusion transformer, attention and feed-forward each behind a norm and maybe before another, one after
// the other in one parallel region. What is computed, and where it is rounded, is what the functions of diffusion.h,
// full_attention.h and gemm.h give that are called one by one: the same to the last bit.
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
  Linear<T> qkv, output, up, down;  // up: with GELU, or gates beside what they gate
  Band band;  // `offset` is the spans' to say
};

// Neighbouring samples of equally many tokens; where they begin, by what their heads are turned, and where in a block of the
// band their first token stands.
struct TokenSpan {
  int64_t sample, token;
  Tokens tokens;
  const float* turns;
  int64_t offset;
};

// Of each block and sample the vectors by which attention's input is shifted and scaled and its result gated, then those of
// the feed-forward. Four, where nothing is shifted; or null.
template <typename T>
struct Modulations {
  enum Kind { kShift, kScale, kGate };

  const T* data;  // [blocks, samples, count, size]
  int64_t samples, count;

  // is_second: of the feed-forward.
  PerSample<T> of(int64_t block, const TokenSpan& span, bool is_second, Kind kind) const {
    const int64_t size = span.tokens.size, half = count / 2, which = is_second * half + kind - (3 - half);
    const bool is_there = data && (kind != kShift || half == 3);
    return {is_there ? data + ((block * samples + span.sample) * count + which) * size : nullptr, count * size};
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
                         heads.size, Band{}, float(1 / std::sqrt(double(heads.size)))});
    }
    for (const FullShape& shape : shapes_) packed_.emplace_back(shape);
    const int64_t attended = first.output.inputs, raised = first.down.inputs;
    normed_.reserve(rows_, hidden_), attended_.reserve(rows_, attended), raised_.reserve(rows_, raised);
    qkv_.reset(new T[size_t(rows_ * first.qkv.outputs)]);
    update_.reset(new T[size_t(rows_ * hidden_)]);
    if (first.qkv.scales || first.output.scales || first.up.scales || first.down.scales)
      quantized_.reserve(rows_, std::max({hidden_, attended, raised}));
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
    modulate_all(block.attention_norm, index, false);
    team_.meet();
    project(team_, factor(normed_), block.qkv, qkv_.get(), block.qkv.outputs);
    team_.meet();
    for (const TokenSpan& span : spans_) place(heads_of(span), span.tokens, block.heads, span.turns);
    team_.meet();
    for (size_t i = 0; i < spans_.size(); i++) attend_span(block, i);
    team_.meet();
    project(team_, factor(attended_), block.output, update_.get(), hidden_);
    team_.meet();
    add_all(block.attended_norm, index, false);
  }

  void feed_forward(const DiffusionBlock<T>& block, int64_t index) {
    modulate_all(block.mlp_norm, index, true);
    team_.meet();
    if (block.up.has_gelu)
      project(team_, factor(normed_), block.up, raised_.row(0), raised_.stride);
    else
      project_gated(team_, factor(normed_), block.up, raised_.row(0), raised_.stride);
    team_.meet();
    project(team_, factor(raised_), block.down, update_.get(), hidden_);
    team_.meet();
    add_all(block.computed_norm, index, true);
  }

  void modulate_all(const Norm<T>& norm, int64_t index, bool is_second) {
    for (const TokenSpan& span : spans_)
      modulate(states_ + span.token * hidden_, span.tokens, norm,
               modulations_.of(index, span, is_second, Modulations<T>::kScale),
               modulations_.of(index, span, is_second, Modulations<T>::kShift), normed_.row(span.token), normed_.stride);
  }

  void add_all(const Norm<T>& norm, int64_t index, bool is_second) {
    for (const TokenSpan& span : spans_) {
      T *states = states_ + span.token * hidden_, *update = update_.get() + span.token * hidden_;
      add_gated(states, update, span.tokens, norm.is_there() ? &norm : nullptr,
                modulations_.of(index, span, is_second, Modulations<T>::kGate), states);
    }
  }

  void attend_span(const DiffusionBlock<T>& block, size_t index) {
    const HeadRow<T>& heads = block.heads;
    const int64_t all = (heads.queries + heads.keys + heads.others) * heads.size;
    const TokenSpan& span = spans_[index];
    FullShape shape = shapes_[index];
    shape.band = block.band, shape.band.offset = span.offset;
    const auto operand = [&](int64_t head) {
      return Operand<T>{heads_of(span) + head * heads.size, span.tokens.length * all, all, heads.size};
    };
    attend_fully(team_, shape, operand(0), operand(heads.queries), operand(heads.queries + heads.keys),
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
  SpreadRows<T> normed_, attended_, raised_;  // what is multiplied
  std::unique_ptr<T[]> qkv_, update_;        // update_: what is added to the states
  QuantizedRows quantized_;
};

}  // namespace omni
