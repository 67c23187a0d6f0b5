// Winograd's algorithm for a convolution of kernel 4, stride 2 and padding 1: 9 multiplications instead of 16.
//
// In one dimension, halving is a sum over two phases, odd and even pixels; in doubling, the output has two phases:
//
//     y[t] = (w0 x[2t - 1] + w2 x[2t + 1]) + (w1 x[2t] + w3 x[2t + 2])
//     y[2t] = w3 x[t - 1] + w1 x[t]        y[2t + 1] = w2 x[t] + w0 x[t + 1]
//
// Each phase is a kernel of two taps and stride 1. Two neighbouring results of such a kernel take three products:
//
//     y0 = g0 x0 + g1 x1 = m0 + m1         m0 = g0 (x0 - x1)
//     y1 = g0 x1 + g1 x2 = m1 - m2         m1 = (g0 + g1) x1        m2 = g1 (x1 - x2)
//
// and so do the gradients of its taps, where h is the gradient of y:
//
//     dg0 = p0 + p1        p0 = h0 (x0 - x1)
//     dg1 = p1 + p2        p1 = (h0 + h1) x1        p2 = -h1 (x1 - x2)
//
// In two dimensions a tile of 2 x 2 results takes 9, each a product of matrices over all channels of many tiles. Only
// for float: bfloat16 would round the differences. An infinite number makes all results of its tile NaN.
#pragma once

#include "simd.h"

namespace HDFAST_ISA {
namespace {

constexpr int64_t phases = 4, products_of_tile = 9;

// The tiles of 2 x 2 pixels of a map, or of one phase of it.
struct Tiles {
  int64_t down, across, count;

  Tiles(int64_t images, int64_t height, int64_t width)
      : down((height + 1) / 2), across((width + 1) / 2), count(images * down * across) {}
};

struct Tile {
  int64_t image, down, across;

  Tile(const Tiles& of, int64_t t)
      : image(t / of.across / of.down), down(t / of.across % of.down), across(t % of.across) {}
};

// Transforms the 3 x 3 pixels of x, of C channels, that a tile's products take: store(f, c, numbers) for each of the 9.
//
// Along each dimension, pixel k of the three is pixel step * (2 * tile + k) + odd - 1 of x, where `odd` is that
// dimension's part of the phase. Pixels outside x are read from `zeros`.
template <class Store>
HDFAST_INLINE void transform_inputs(const float* x, const Tile& tile, int64_t height, int64_t width, int64_t C,
                                    int64_t step, int64_t phase, const float* zeros, Store store) {
  const float* pixel[3][3];
  for (int64_t i = 0; i < 3; i++)
    for (int64_t j = 0; j < 3; j++) {
      const int64_t row = step * (2 * tile.down + i) + phase / 2 - 1;
      const int64_t column = step * (2 * tile.across + j) + phase % 2 - 1;
      const bool inside = row >= 0 && row < height && column >= 0 && column < width;
      pixel[i][j] = inside ? x + ((tile.image * height + row) * width + column) * C : zeros;
    }
  for (int64_t c = 0; c < C; c += W) {
    Vf d[3][3];
    for (int i = 0; i < 3; i++) {
      const Vf a = load(pixel[i][0] + c, Whole{}), b = load(pixel[i][1] + c, Whole{}),
               e = load(pixel[i][2] + c, Whole{});
      d[i][0] = a - b, d[i][1] = b, d[i][2] = b - e;
    }
    for (int j = 0; j < 3; j++) {
      store(j, c, d[0][j] - d[1][j]);
      store(3 + j, c, d[1][j]);
      store(6 + j, c, d[1][j] - d[2][j]);
    }
  }
}

}  // namespace
}  // namespace HDFAST_ISA
