// Norms of pictures whose channels lie last, and SiLU of them, in float32 and rounded once.
#pragma once

#include <vector>

#include "elementwise.h"
#include "team.h"

namespace omni {

// x / rms(x) * weight of every pixel by itself; channels: a multiple of kWidth. To be called by every thread of a team.
template <typename T>
void norm_pixels(const T* x, const T* weight, int64_t pixels, int64_t channels, float epsilon, bool activated, T* out) {
#pragma omp for schedule(static) nowait
  for (int64_t pixel = 0; pixel < pixels; pixel++) {
    const T* from = x + pixel * channels;
    const float scale = inverse_rms(from, channels, epsilon);
    for (int64_t channel = 0; channel < channels; channel += kWidth) {
      const Vec y = load(from + channel) * scale * load(weight + channel);
      store(out + pixel * channels + channel, activated ? silu(y) : y);
    }
  }
}

struct GroupNormShape {
  int64_t pictures, pixels, channels, groups;  // channels: a multiple of kWidth and of groups
  float epsilon;
  int32_t activated;
};

// Of all pictures; what a norm is made of is kept here while a team works on it. Moments are summed pixel by pixel in blocks
// of one size, whatever the threads, as distances from a channel's first number: a mean far from zero costs no digits.
template <typename T>
class GroupNorm {
  static constexpr int64_t kPixels = 128;  // of a block

 public:
  GroupNorm(const GroupNormShape& shape, const T* weight, const T* bias)
      : shape_(shape), weight_(weight), bias_(bias), blocks_((shape.pixels + kPixels - 1) / kPixels),
        sums_(size_t(shape.pictures * blocks_ * 2 * shape.channels)), lines_(size_t(shape.pictures * 2 * shape.channels)) {}

  // To be called by every thread of the team.
  void run(Team& team, const T* x, T* out) {
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < shape_.pictures * blocks_; task++) sum(x, task / blocks_, task % blocks_);
    team.meet();
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < shape_.pictures * shape_.groups; task++)
      fit(x, task / shape_.groups, task % shape_.groups);
    team.meet();
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < shape_.pictures * blocks_; task++) apply(x, task / blocks_, task % blocks_, out);
  }

 private:
  int64_t first(int64_t picture, int64_t block) const { return (picture * shape_.pixels + block * kPixels) * shape_.channels; }
  int64_t count(int64_t block) const { return std::min(kPixels, shape_.pixels - block * kPixels); }
  float* sums(int64_t picture, int64_t block) { return sums_.data() + (picture * blocks_ + block) * 2 * shape_.channels; }
  float* lines(int64_t picture) { return lines_.data() + picture * 2 * shape_.channels; }

  // Of each channel of a block: distances, and their squares.
  void sum(const T* x, int64_t picture, int64_t block) {
    const T *from = x + first(picture, block), *origin = x + first(picture, 0);
    float* to = sums(picture, block);
    for (int64_t channel = 0; channel < shape_.channels; channel += kWidth) {
      const Vec zero = load(origin + channel);
      Vec distances{}, squares{};
      for (int64_t pixel = 0; pixel < count(block); pixel++) {
        const Vec distance = load(from + pixel * shape_.channels + channel) - zero;
        distances += distance, squares += distance * distance;
      }
      store(to + channel, distances), store(to + shape_.channels + channel, squares);
    }
  }

  // What the channels of a group are made of: their mean, and what is multiplied with the distance from it.
  void fit(const T* x, int64_t picture, int64_t group) {
    const int64_t width = shape_.channels / shape_.groups, begin = group * width;
    const double pixels = double(shape_.pixels);
    std::vector<double> means(size_t(width), 0.0);
    double mean = 0.0, squares = 0.0;
    for (int64_t i = 0; i < width; i++) {
      double distances = 0.0, of_channel = 0.0;
      for (int64_t block = 0; block < blocks_; block++) {
        const float* found = sums(picture, block) + begin + i;
        distances += found[0], of_channel += found[shape_.channels];
      }
      means[size_t(i)] = load_one(x + first(picture, 0) + begin + i) + distances / pixels;
      mean += means[size_t(i)] / double(width);
      squares += of_channel - distances * distances / pixels;
    }
    for (double own : means) squares += (own - mean) * (own - mean) * pixels;
    const double scale = 1.0 / std::sqrt(squares / (pixels * double(width)) + double(shape_.epsilon));
    float* line = lines(picture) + begin;
    for (int64_t i = 0; i < width; i++) {
      line[i] = float(mean), line[shape_.channels + i] = float(scale * load_one(weight_ + begin + i));
    }
  }

  void apply(const T* x, int64_t picture, int64_t block, T* out) {
    const float* line = lines(picture);
    const int64_t begin = first(picture, block);
    for (int64_t pixel = 0; pixel < count(block); pixel++)
      for (int64_t channel = 0; channel < shape_.channels; channel += kWidth) {
        const int64_t at = begin + pixel * shape_.channels + channel;
        const Vec distance = load(x + at) - load(line + channel);
        const Vec y = distance * load(line + shape_.channels + channel) + load(bias_ + channel);
        store(out + at, shape_.activated ? silu(y) : y);
      }
  }

  const GroupNormShape& shape_;
  const T *weight_, *bias_;
  const int64_t blocks_;  // of a picture
  std::vector<float> sums_, lines_;
};

}  // namespace omni
