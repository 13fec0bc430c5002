// Convolutions of 3 x 3 with pictures whose channels lie last, two by two results at once from a tile of their
// neighbourhood: S. Winograd's minimal filtering F(2 x 2, 3 x 3) as A. Lavin and S. Gray have it (2015), 16 products
// in place of 36; or four by four, 36 in place of 144, which float32 alone has the digits for. Of a picture that is
// doubled first, each pixel four times, two numbers of a tile are one and the same along each side, so that 9 products
// are left and the doubled picture is never made. A tile's numbers are rounded to the element type before they are
// multiplied; sums are float32. What a pixel becomes does not depend on the picture's batch.
#pragma once

#include <vector>

#include "gemm.h"

namespace omni {

// One side of a tile: numbers of the picture -> factors; products of these with those of the weights -> two results.
struct PlainTile {
  static constexpr int kPoints = 4, kResults = 2;
  static constexpr int64_t kStep = 2;  // pixels to the next tile

  static void take(Vec (&d)[kPoints]) {
    const Vec inner = d[1];
    d[0] -= d[2], d[1] += d[2], d[2] -= inner, d[3] = inner - d[3];
  }
  static void give(const Vec (&m)[kPoints], Vec (&y)[kResults]) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3]; }
};

struct WideTile {
  static constexpr int kPoints = 6, kResults = 4;
  static constexpr int64_t kStep = 4;

  static void take(Vec (&d)[kPoints]) {
    const Vec one = d[4] - 4.0f * d[2], two = d[3] - 4.0f * d[1], three = d[4] - d[2], four = 2.0f * (d[3] - d[1]);
    const Vec first = 4.0f * (d[0] - d[2]) + three, last = 4.0f * d[1] - 5.0f * d[3] + d[5];
    d[0] = first, d[1] = one + two, d[2] = one - two, d[3] = three + four, d[4] = three - four, d[5] = last;
  }
  static void give(const Vec (&m)[kPoints], Vec (&y)[kResults]) {
    const Vec one = m[1] + m[2], two = m[1] - m[2], three = m[3] + m[4], four = m[3] - m[4];
    y[0] = m[0] + one + three, y[1] = two + 2.0f * four, y[2] = one + 4.0f * three, y[3] = two + 8.0f * four + m[5];
  }
};

struct DoubledTile {
  static constexpr int kPoints = 3, kResults = 2;
  static constexpr int64_t kStep = 1;

  static void take(Vec (&d)[kPoints]) { d[0] -= d[1], d[2] = d[1] - d[2]; }
  static void give(const Vec (&m)[kPoints], Vec (&y)[kResults]) { y[0] = m[0] + m[1], y[1] = m[1] - m[2]; }
};

struct Pictures {
  int64_t count, height, width;  // of what is written, and pixels of what is read
  int64_t inputs, outputs;       // channels: a multiple of kWidth, and of kPanel
  int64_t frames;                // that each reads: itself and those behind it, of which there are frames - 1 more

  int64_t depth() const { return frames * inputs; }
};

// weight: panels [outputs / kPanel][kPoints * kPoints][kPanel, frames * inputs], each packed. bias, residual: or null.
template <typename T>
struct Filter {
  const T *weight, *bias, *residual;
};

constexpr int64_t kFactorBytes = 320 << 10;  // of a task, which stay in the second cache
constexpr int64_t kMostTiles = 96;           // of a task
#if defined(OMNI_TILES)
constexpr int64_t kPassTiles = kTilePassRows;  // that are multiplied in one pass
#else
constexpr int64_t kPassTiles = kMostRows;
#endif
static_assert(kMostTiles % kPassTiles == 0, "whole passes");

template <typename T, typename Tile>
class Convolution {
  static constexpr int kPoints = Tile::kPoints, kProducts = kPoints * kPoints, kResults = Tile::kResults;
  static constexpr int64_t kScale = kResults / Tile::kStep;  // pixels that are written to one that is read

 public:
  Convolution(const Pictures& pictures, const Filter<T>& filter) : pictures_(pictures), filter_(filter) {
    rows_ = (pictures.height + Tile::kStep - 1) / Tile::kStep;
    columns_ = (pictures.width + Tile::kStep - 1) / Tile::kStep;
    stride_ = stride_of<T>(pictures.depth());
    const int64_t fitting = kFactorBytes / (kProducts * stride_ * int64_t(sizeof(T)));
    at_once_ = std::clamp(fitting / kPassTiles * kPassTiles, kPassTiles, kMostTiles);
  }

  // To be called by every thread of a team, which shares the tiles.
  void run(const T* x, T* out) const {
    const int64_t all = pictures_.count * rows_ * columns_, tasks = (all + at_once_ - 1) / at_once_;
    thread_local std::vector<T> factors;  // kept: their pages would be cleared anew for every picture
    thread_local std::vector<float> sums;
    factors.resize(std::max(factors.size(), size_t(kProducts * at_once_ * stride_)));
    sums.resize(std::max(sums.size(), size_t(kProducts * at_once_ * kPanel)));
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t first = task * all / tasks, count = (task + 1) * all / tasks - first;
      Place places[kMostTiles];
      for (int64_t tile = 0; tile < count; tile++) {
        places[tile] = place(first + tile);
        for (int64_t frame = 0; frame < pictures_.frames; frame++)
          take(x, places[tile], frame, factors.data() + tile * stride_ + frame * pictures_.inputs);
      }
      for (int64_t panel = 0; panel < pictures_.outputs / kPanel; panel++) {
        multiply(factors.data(), count, panel, sums.data());
        for (int64_t tile = 0; tile < count; tile++) give(sums.data() + tile * kPanel, places[tile], panel, out);
      }
    }
  }

 private:
  struct Place {
    int64_t picture, row, column;  // of tiles
  };

  Place place(int64_t tile) const {
    return {tile / columns_ / rows_, tile / columns_ % rows_, tile % columns_};
  }

  // A tile's factors of one frame, those of the products at_once_ * stride_ apart.
  void take(const T* x, const Place& at, int64_t frame, T* factors) const {
    alignas(64) static const T zeros[kWidth] = {};
    const T* pixels[kPoints][kPoints];
    for (int i = 0; i < kPoints; i++)
      for (int j = 0; j < kPoints; j++) {
        const int64_t row = at.row * Tile::kStep + i - 1, column = at.column * Tile::kStep + j - 1;
        const bool is_there = row >= 0 && row < pictures_.height && column >= 0 && column < pictures_.width;
        const int64_t pixel = ((at.picture + frame) * pictures_.height + row) * pictures_.width + column;
        pixels[i][j] = is_there ? x + pixel * pictures_.inputs : nullptr;
      }
    for (int64_t channel = 0; channel < pictures_.inputs; channel += kWidth) {
      Vec turned[kPoints][kPoints];
      for (int i = 0; i < kPoints; i++) {
        Vec line[kPoints];
        for (int j = 0; j < kPoints; j++) line[j] = load(pixels[i][j] ? pixels[i][j] + channel : zeros);
        Tile::take(line);
        for (int j = 0; j < kPoints; j++) turned[j][i] = line[j];
      }
      for (int j = 0; j < kPoints; j++) {
        Tile::take(turned[j]);
        for (int i = 0; i < kPoints; i++) store(factors + (i * kPoints + j) * at_once_ * stride_ + channel, turned[j][i]);
      }
    }
  }

  // -> sums [kProducts][at_once_, kPanel].
  void multiply(const T* factors, int64_t count, int64_t panel, float* sums) const {
    const T* weight = filter_.weight + panel * kProducts * kPanel * pictures_.depth();
    for (int64_t product = 0; product < kProducts; product++, weight += kPanel * pictures_.depth()) {
      float* own = sums + product * at_once_ * kPanel;
      multiply_rows(factors + product * at_once_ * stride_, stride_, count, pictures_.depth(), weight,
                    [&](int64_t row, int64_t i, Vec sum) { store(own + row * kPanel + i, sum); });
    }
  }

  // A tile's results, of one panel of channels.
  void give(const float* sums, const Place& at, int64_t panel, T* out) const {
    const int64_t height = pictures_.height * kScale, width = pictures_.width * kScale;
    for (int64_t i = 0; i < kPanel; i += kWidth) {
      Vec lines[kResults][kPoints];
      for (int column = 0; column < kPoints; column++) {
        Vec products[kPoints];
        for (int row = 0; row < kPoints; row++)
          products[row] = load(sums + (row * kPoints + column) * at_once_ * kPanel + i);
        Vec down[kResults];
        Tile::give(products, down);
        for (int row = 0; row < kResults; row++) lines[row][column] = down[row];
      }
      for (int64_t row = 0; row < kResults && kResults * at.row + row < height; row++) {
        Vec results[kResults];
        Tile::give(lines[row], results);
        for (int64_t column = 0; column < kResults && kResults * at.column + column < width; column++) {
          const int64_t pixel = (at.picture * height + kResults * at.row + row) * width + kResults * at.column + column;
          finish(results[column], panel * kPanel + i, pixel * pictures_.outputs, out);
        }
      }
    }
  }

  void finish(Vec y, int64_t channel, int64_t pixel, T* out) const {
    if (filter_.bias) y += load(filter_.bias + channel);
    if (filter_.residual) y = rounded<T>(y) + load(filter_.residual + pixel + channel);
    store(out + pixel + channel, y);
  }

  const Pictures& pictures_;
  const Filter<T>& filter_;
  int64_t rows_, columns_;   // of tiles
  int64_t stride_, at_once_; // numbers from one tile's factors to the next; tiles of a task at most
};

enum class TileKind : int32_t { kPlain, kDoubled, kWide };

template <typename T>
void convolve(const T* x, const Pictures& pictures, const Filter<T>& filter, TileKind kind, T* out) {
  if (kind == TileKind::kDoubled)
    Convolution<T, DoubledTile>(pictures, filter).run(x, out);
  else if (kind == TileKind::kPlain)
    Convolution<T, PlainTile>(pictures, filter).run(x, out);
  else if constexpr (sizeof(T) == 4)
    Convolution<T, WideTile>(pictures, filter).run(x, out);
}

}  // namespace omni
