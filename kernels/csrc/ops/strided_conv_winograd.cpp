#include <omp.h>

#include <algorithm>

#include "../gemm_tile.h"
#include "../ops.h"
#include "../simd.h"
#include "../winograd.h"

// Halving and doubling of maps by Winograd's F(2 x 2, 2 x 2), see winograd.h. A block of tiles stays in the L2 cache
// while it is transformed, multiplied and transformed back.
//
// Axes: phase (4), f products of a tile (9), t tiles, C channels of x, O of y.

namespace HDFAST_ISA {
namespace {

constexpr int64_t block_bytes = 768 << 10;        // of the L2 cache, for a block
constexpr int64_t largest_block = 8 * tile_rows;  // tiles; more would not help
constexpr int64_t least_tiles_of_thread = 64;     // for fewer, transforming the weights does not pay off

struct Layout {
  bool doubling;
  int64_t height, width, C, O;  // of the smaller map; channels
  Tiles tiles;
  int64_t step_in, step_out;  // distance in pixels of neighbours in a phase, of x and of y
  int64_t panels, block;      // panels of O; tiles in a block

  Layout(bool doubling, int64_t images, int64_t height, int64_t width, int64_t C, int64_t O)
      : doubling(doubling), height(height), width(width), C(C), O(O), tiles(images, height, width),
        step_in(doubling ? 1 : 2), step_out(doubling ? 2 : 1), panels((O + panel - 1) / panel) {
    const int64_t pixels = 2 * 4 * step_in * step_in;  // of x, for a tile of this block and one of the next
    const int64_t tile_bytes = (products_of_tile * (C + O) + pixels * C) * int64_t(sizeof(float));
    // Weights too large for the last-level cache come from memory for every block: then fewer blocks are better.
    const bool far = weights_at(phases, 0, 0) * int64_t(sizeof(float)) > far_bytes;
    const int64_t fit = block_bytes / tile_bytes / tile_rows * tile_rows;
    block = far ? largest_block : std::clamp<int64_t>(fit, tile_rows, largest_block);
  }

  // Whether this is faster than PyTorch. If a side of the map is odd, results beyond its edge are wasted work.
  bool pays(int threads) const {
    return C % 16 == 0 && O % 16 == 0 && tiles.count >= least_tiles_of_thread * threads &&
           3 * tiles.down * tiles.across <= height * width;
  }

  // Element k of a tile's row of two results lies at step_out * (2 t + k) + origin_out.
  int64_t origin_out(int64_t odd) const { return doubling ? odd : 0; }

  // weights (phase, f, panel of O, C, panel), inputs (f, group of C, t, group), products (f, panel of O, t, panel); the
  // latter two with a gap so that the nine are not a multiple of a page apart
  int64_t weights_at(int64_t phase, int64_t f, int64_t p) const {
    return ((phase * products_of_tile + f) * panels + p) * C * panel;
  }
  int64_t inputs_at(int64_t f) const { return f * (C * block + 8 * group<float>); }
  int64_t products_at(int64_t f) const { return f * (panels * panel * block + 8 * group<float>); }
};

// Called by all threads together. The weight is (channels of the smaller map, of the larger one, 4, 4).
void transform_weights(const Layout& at, const float* weight, float* out) {
  const int64_t large = at.doubling ? at.O : at.C;
#pragma omp for schedule(static) collapse(2)
  for (int64_t c = 0; c < at.C; c++)
    for (int64_t o = 0; o < at.O; o += W) {
      Vf w[4][4];
      for (int k = 0; k < W; k++) {
        const float* const from = weight + (at.doubling ? c * large + o + k : (o + k) * large + c) * 16;
        for (int i = 0; i < 16; i++) w[i / 4][i % 4][k] = from[i];
      }
      const auto tap = [&](int64_t odd, int64_t k) { return at.doubling ? 3 - odd - 2 * k : odd + 2 * k; };
      for (int64_t phase = 0; phase < phases; phase++) {
        Vf g[3][2];
        for (int j = 0; j < 2; j++) {
          g[0][j] = w[tap(phase / 2, 0)][tap(phase % 2, j)], g[2][j] = w[tap(phase / 2, 1)][tap(phase % 2, j)];
          g[1][j] = g[0][j] + g[2][j];
        }
        for (int64_t i = 0; i < 3; i++) {
          const Vf row[3] = {g[i][0], g[i][0] + g[i][1], g[i][1]};
          for (int64_t j = 0; j < 3; j++)
            store(out + at.weights_at(phase, 3 * i + j, o / panel) + c * panel + o % panel, row[j], Whole{});
        }
      }
    }
}

// Transforms tiles [first, first + count), repeating the last tile beyond the end.
void transform_block(const Layout& at, const float* x, int64_t phase, int64_t first, int64_t count, const float* zeros,
                     float* inputs) {
  for (int64_t t = 0; t < count; t++) {
    const Tile tile(at.tiles, std::min(first + t, at.tiles.count - 1));
    transform_inputs(x, tile, at.height * at.step_in, at.width * at.step_in, at.C, at.step_in, phase, zeros,
                     [&](int64_t f, int64_t c, Vf numbers) {
                       float* const of_group = inputs + at.inputs_at(f) + c / group<float> * at.block * group<float>;
                       store(of_group + t * group<float> + c % group<float>, numbers, Whole{});
                     });
  }
}

// The start of the first row of pixels that tile t takes.
const float* start_of(const Layout& at, const float* x, int64_t t) {
  const Tile tile(at.tiles, t);
  return x + (tile.image * at.height + 2 * tile.down) * at.step_in * at.step_in * at.width * at.C;
}

void multiply(const Layout& at, const float* inputs, const float* weights, int64_t phase, int64_t count, bool fresh,
              float* products, Prefetcher<float>& ahead) {
  for (int64_t f = 0; f < products_of_tile; f++)
    for (int64_t p = 0; p < at.panels; p++)
      for (int64_t t = 0; t < count; t += tile_rows) {
        const float* const left = inputs + at.inputs_at(f) + t * group<float>;
        const float* const right = weights + at.weights_at(phase, f, p);
        float* const sums = products + at.products_at(f) + (p * at.block + t) * panel;
        ahead.advance();
        if (at.O - p * panel >= panel)
          multiply_tile<2>(left, at.block * group<float>, right, at.C / group<float>, sums, fresh);
        else
          multiply_tile<1>(left, at.block * group<float>, right, at.C / group<float>, sums, fresh);
      }
}

template <bool far>
void transform_products(const Layout& at, const float* products, int64_t phase, int64_t first, int64_t count,
                        float* y) {
  const int64_t height = at.height * at.step_out, width = at.width * at.step_out;
  const int64_t down = at.step_out * width * at.O, across = at.step_out * at.O;
  for (int64_t t = 0; t < count; t++) {
    const Tile tile(at.tiles, first + t);
    const int64_t row = 2 * at.step_out * tile.down + at.origin_out(phase / 2);
    const int64_t column = 2 * at.step_out * tile.across + at.origin_out(phase % 2);
    const bool below = row + at.step_out < height, right = column + at.step_out < width;
    float* const out = y + ((tile.image * height + row) * width + column) * at.O;
    for (int64_t o = 0; o < at.O; o += W) {
      const float* const from = products + (o / panel * at.block + t) * panel + o % panel;
      Vf s[2][3];
      for (int64_t j = 0; j < 3; j++) {
        const Vf a = load(from + at.products_at(j), Whole{}), b = load(from + at.products_at(3 + j), Whole{}),
                 c = load(from + at.products_at(6 + j), Whole{});
        s[0][j] = a + b, s[1][j] = b - c;
      }
      put<far>(out + o, s[0][0] + s[0][1], Whole{});
      if (right) put<far>(out + across + o, s[0][1] - s[0][2], Whole{});
      if (below) put<far>(out + down + o, s[1][0] + s[1][1], Whole{});
      if (below && right) put<far>(out + down + across + o, s[1][1] - s[1][2], Whole{});
    }
  }
}

}  // namespace

bool strided_conv_winograd(const float* x, const float* weight, float* y, int64_t images, int64_t height, int64_t width,
                           int64_t channels_in, int64_t channels_out, bool doubling, int threads) {
  const Layout at(doubling, images, height, width, channels_in, channels_out);
  if (!at.pays(threads)) return false;
  Scratch<float> weights(at.weights_at(phases, 0, 0)), zeros(at.C);
  std::fill_n(static_cast<float*>(zeros), at.C, 0.f);
  with_bool(is_far(y, images * height * width * at.step_out * at.step_out, at.O), [&](auto far) {
#pragma omp parallel num_threads(threads)
    {
      transform_weights(at, weight, weights);
      Scratch<float> inputs(at.inputs_at(products_of_tile)), products(at.products_at(products_of_tile));
      const int64_t team = omp_get_num_threads(), mine = omp_get_thread_num();
      const int64_t last = at.tiles.count * (mine + 1) / team;
      for (int64_t first = at.tiles.count * mine / team; first < last; first += at.block) {
        const int64_t count = std::min(at.block, last - first), next = first + count;
        const int64_t whole = (count + tile_rows - 1) / tile_rows * tile_rows;
        Prefetcher<float> ahead(start_of(at, x, next), start_of(at, x, std::min(next + at.block, last)),
                                phases * products_of_tile * at.panels * (whole / tile_rows));
        for (int64_t phase = 0; phase < phases; phase++) {
          transform_block(at, x, phase, first, whole, zeros, inputs);
          multiply(at, inputs, weights, phase, whole, doubling || phase == 0, products, ahead);
          if (doubling || phase == phases - 1) transform_products<far>(at, products, phase, first, count, y);
        }
      }
      fence();
    }
  });
  return true;
}

}  // namespace HDFAST_ISA
